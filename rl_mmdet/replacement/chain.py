"""Chains: the ordered blocks of one stage, who is kept, and who are a block's neighbours."""
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

Sources = dict[str, tuple[bool, bool]]
"""For every parameter name of a block: does the neighbour before / after it offer a tensor of the same shape?"""


@dataclass(frozen=True)
class Chain:
    """The ordered blocks of one stage (or of a whole plain ViT).

    Args:
        name: qualified name of the container that holds the blocks, e.g. ``'layer3'``.
        container: that ``nn.Sequential`` or ``nn.ModuleList``.
    """
    name: str
    container: nn.Module

    @property
    def keys(self) -> list[str]:
        """The blocks' names inside the container, in order."""
        return list(self.container._modules)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.container.children())

    @property
    def frozen(self) -> bool:
        """Nothing in the chain learns, so there is nothing to save by replacing."""
        return not any(parameter.requires_grad for parameter in self.container.parameters())

    def __len__(self) -> int:
        return len(self.container)

    def block_name(self, index: int) -> str:
        return f'{self.name}.{self.keys[index]}'

    def neighbours(self, index: int, replaced: Collection[int]) -> tuple[int | None, int | None]:
        """Indices of the nearest kept block before and after ``index``; None where the chain ends."""
        before = next((i for i in range(index - 1, -1, -1) if i not in replaced), None)
        after = next((i for i in range(index + 1, len(self)) if i not in replaced), None)
        return before, after

    def why_not(self, index: int, replaced: Collection[int] = ()) -> str | None:
        """Why block ``index`` can't be replaced when the blocks ``replaced`` are; None if it can."""
        if self.frozen:
            return 'its stage is frozen (no parameter learns)'
        before, after = self.neighbours(index, replaced)
        if before is None:
            return 'no kept block before it in its stage'
        if after is None:
            return 'no kept block after it in its stage'
        blocks = self.blocks
        sources = match_sources(blocks[index], blocks[before], blocks[after])
        for name, (in_before, in_after) in sources.items():
            if not in_before and not in_after:
                shape = tuple(blocks[index].get_parameter(name).shape)
                return (f'{name} {shape} has no tensor of its shape in '
                        f'{self.block_name(before)} or {self.block_name(after)}')
        for side, neighbour in enumerate((before, after)):
            if not any(agree[side] for agree in sources.values()):
                return f'{self.block_name(neighbour)} has no tensor of its shapes'
        return None

    def replaceable(self) -> list[int]:
        """The blocks that can be replaced one at a time."""
        return [index for index in range(len(self)) if self.why_not(index) is None]


def match_sources(block: nn.Module, before: nn.Module, after: nn.Module) -> Sources:
    """Compare the shapes of a block's parameters with those of its two neighbours.

    A tensor whose shape agrees with only one neighbour is taken from that one (method.md, RL-v1).
    """
    def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in all_parameters(module)}

    in_before, in_after = shapes(before), shapes(after)
    return {name: (in_before.get(name) == shape, in_after.get(name) == shape)
            for name, shape in shapes(block).items()}


def all_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter slot of ``module``, tied ones under each of their names."""
    return module.named_parameters(remove_duplicate=False)


def find_chains(model: nn.Module) -> dict[str, Chain]:
    """Find the chains of ``model``: containers whose children are residual units of one class.

    A residual unit has at least two weight tensors (convolution or linear), which leaves out lists of single
    convolutions such as a feature pyramid's, and no chain of three or more inside, which leaves out lists of
    stages. Neighbours share at least one weight's shape.

    Args:
        model: a backbone; in a whole detector, heads made of such lists would be found as well.

    Returns:
        Chains by qualified name, in the model's order. They don't nest.
    """
    chains = {}

    def search(module: nn.Module, name: str) -> None:
        if _is_chain(module):
            chains[name] = Chain(name, module)
            return
        for key, child in module.named_children():
            search(child, f'{name}.{key}' if name else key)

    search(model, '')
    return chains


def _is_chain(module: nn.Module) -> bool:
    if not _is_container(module) or len(module) < 2:
        return False
    blocks = list(module.children())
    return (len({type(block) for block in blocks}) == 1 and all(_is_residual_unit(block) for block in blocks)
            and any(_share_a_weight_shape(*pair) for pair in pairwise(blocks)))


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _is_residual_unit(block: nn.Module) -> bool:
    if _is_container(block) or len(_weight_shapes(block)) < 2:
        return False
    return not any(_is_chain(inner) and len(inner) > 2 for inner in block.modules() if inner is not block)


def _share_a_weight_shape(block: nn.Module, other: nn.Module) -> bool:
    return bool(_weight_shapes(block).items() & _weight_shapes(other).items())


def _weight_shapes(block: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in block.named_parameters() if parameter.ndim >= 2}
