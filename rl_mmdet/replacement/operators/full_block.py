"""RL-v1's operator: the whole removed block, or some submodules of it."""
from collections.abc import Sequence

from torch import nn

from ..block_structure import all_parameters
from ..registry import OPERATORS
from ..resize import Shape
from .operator import Operator


@OPERATORS.register_module()
class FullBlock(Operator):
    r"""RL-v1: the whole removed block, :math:`h_{out} = B_i(h_{in}; θ_i)`, with the fused tensors as its weights.

    It costs the forward computation of the block it stands for; what it saves are learnable parameters, their
    gradients and their optimizer state. The materialized model is the baseline architecture.

    With ``only``, some submodules of the block are replaced: :math:`h_{out} = B_i(h_{in}; θ_i, φ_i)` with fused tensors
    :math:`θ_i` for these and the block's own :math:`φ_i` for the others, which keep their names, start from a
    baseline's checkpoint and learn as in every other block. ``only='attn'`` is the paper's way with ViTs: the attention
    is replaced and the MLP stays.

    Args:
        only: names of the submodules that are replaced, such as ``'attn'`` or ``('conv1', 'conv2.conv')``. Blocks
            that don't have all of them are kept. None for the whole block.

    Raises:
        TypeError: ``only`` is neither a name nor a list of names.
        ValueError: ``only`` is empty.

    Source: arXiv 2410.01239.
    """

    def __init__(self, only: str | Sequence[str] | None = None) -> None:
        names = (only,) if isinstance(only, str) else () if only is None else only
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise TypeError("FullBlock: only must be a submodule's name such as 'attn', or a list of names, got "
                            f'{only!r}')
        if only is not None and not all(names or ['']):
            raise ValueError(f'FullBlock: only={only!r} names no submodule; leave it out to replace whole blocks')
        self.only = tuple(names)

    def why_not(self, block: nn.Module) -> str | None:
        kind, modules = type(block).__name__, dict(block.named_modules())
        for name in self.only:
            if name not in modules:
                return f'only={name!r}, but a {kind} has no such submodule; it has {", ".join(_with_weights(block))}'
            if not any(True for _ in modules[name].parameters()):
                return (f'only={name!r}, but a {kind}\'s {name} has no parameters; those with some: '
                        f'{", ".join(_with_weights(block))}')
        if self.only and not self.untouched(block):
            return f'only={self.only} is all that a {kind} has; leave it out to replace whole blocks'
        return None

    def needs(self, block: nn.Module) -> dict[str, Shape]:
        untouched = self.untouched(block)
        return {name: shape for name, shape in super().needs(block).items() if name not in untouched}

    def untouched(self, block: nn.Module) -> frozenset[str]:
        inside = tuple(f'{name}.' for name in self.only)
        return frozenset(name for name, _ in all_parameters(block) if inside and not name.startswith(inside))

    def __repr__(self) -> str:
        return f'FullBlock(only={self.only})' if self.only else 'FullBlock()'


def _with_weights(block: nn.Module) -> list[str]:
    """Names of the block's children that have parameters."""
    return [name for name, child in block.named_children() if any(True for _ in child.parameters())]
