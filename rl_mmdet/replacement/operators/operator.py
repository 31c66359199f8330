"""What all operators share: a module without weights that runs on tensors made for it."""
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ..block_structure import all_parameters
from ..resize import Shape


class Operator:
    """A computation whose weights are made for it: a module without weights of its own, its *template*, runs on them.

    Attributes:
        repeatable: a second forward run costs next to nothing and changes nothing, so that outputs can be made again
            in backward.
        light: it computes less than the block it stands for.
        only: names of the submodules that are replaced, where it isn't the whole block.
    """
    repeatable = False
    light = False
    only: tuple[str, ...] = ()

    def why_not(self, block: nn.Module) -> str | None:
        """Why it can't stand for ``block``; None if it can."""
        return None

    def needs(self, block: nn.Module) -> dict[str, Shape]:
        """The tensors of ``block`` that it needs, by name, and in which shape :meth:`read` gives them; here all."""
        return {name: tuple(parameter.shape) for name, parameter in all_parameters(block)}

    def untouched(self, block: nn.Module) -> frozenset[str]:
        """Names of the tensors of ``block`` that stay its own and learn as ever; here none."""
        return frozenset()

    def read(self, tensor: Tensor, shape: Shape) -> Tensor:
        """What it needs of a tensor of a kept block, before the fusion: here the leading part of that ``shape``."""
        return tensor if tuple(tensor.shape) == shape else tensor[tuple(map(slice, shape))]

    def template(self, block: nn.Module) -> nn.Module:
        """The ordinary module that runs in the place of ``block``, here the block; its weights don't matter."""
        return block

    def new_parameters(self, block: nn.Module) -> dict[str, nn.Parameter]:
        """What the operator learns itself, beside what the fusion learns."""
        return {}

    def start(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values from which those of the layer's ``parameters`` start that are the operator's."""
        return {}

    def weights(self, template: nn.Module, tensors: dict[str, Tensor],
                parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """All weights of the template, from the layer's ``parameters`` and the fused ``tensors``; here these."""
        return tensors

    def __call__(self, template: nn.Module, weights: dict[str, Tensor], method: str, *args: Any, **kwargs: Any) -> Any:
        """Run ``method`` of the template, in general ``'forward'``, on its ``weights``."""
        if method == 'forward':
            return functional_call(template, weights, args, kwargs)
        return functional_call(_Method(template, method), {f'block.{name}': tensor for name, tensor in weights.items()},
                               args, kwargs)

    def __repr__(self) -> str:
        return f'{type(self).__name__}()'


class _Method(nn.Module):
    """Another method of a block, as the forward of a module: :func:`functional_call` runs nothing else."""

    def __init__(self, block: nn.Module, method: str) -> None:
        super().__init__()
        self.block = block
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.block, self.method)(*args, **kwargs)
