"""What all operators share: a module without weights that runs on tensors made for it."""
from typing import Any

from torch import Tensor, nn

from ..block_structure import all_parameters, slot_of
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
        """What it needs, in ``shape``, of a larger tensor of a kept block, before the fusion: here the leading part."""
        return tensor[tuple(map(slice, shape))]

    def template(self, block: nn.Module) -> nn.Module:
        """The ordinary module that runs in the place of ``block``, here the block; its weights don't matter."""
        return block

    def start(self, block: nn.Module) -> dict[str, Tensor]:
        """From what its own parameters start in the place of ``block``, beside the fusion's; here it has none."""
        return {}

    def weights(self, template: nn.Module, tensors: dict[str, Tensor],
                parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """All weights of the template, from the layer's ``parameters`` and the fused ``tensors``; here these."""
        return tensors

    def __call__(self, template: nn.Module, weights: dict[str, Tensor], method: str, *args: Any, **kwargs: Any) -> Any:
        """Run ``method`` of the template, in general ``'forward'``, on its ``weights``.

        They stand in its empty slots meanwhile, as with :func:`torch.func.functional_call`, whose care for tied weights
        and whatever else a module may hold takes as long as a block's convolutions.
        """
        run = template if method == 'forward' else getattr(template, method)
        slots = [slot_of(template, name) for name in weights]
        before = [owner._parameters[slot] for owner, slot in slots]
        try:
            for (owner, slot), tensor in zip(slots, weights.values(), strict=True):
                owner._parameters[slot] = tensor
            return run(*args, **kwargs)
        finally:
            for (owner, slot), tensor in zip(slots, before, strict=True):
                owner._parameters[slot] = tensor

    def __repr__(self) -> str:
        return f'{type(self).__name__}()'
