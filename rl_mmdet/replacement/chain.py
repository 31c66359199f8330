"""Chains: the ordered blocks of one stage, who is kept, and who are a block's neighbours."""
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import Tensor, nn

Sources = dict[str, tuple[int | None, int | None]]
"""For every parameter name of a block: the index of the kept block before / after it whose tensor is used, if any."""


@dataclass(frozen=True)
class Chain:
    """The ordered blocks of one stage (or of a whole plain ViT).

    Args:
        path: qualified name of the module that holds the blocks, e.g. ``'layer3'``.
        container: that module.
        start, stop: which of its children are the blocks; all by default.
        name: how plans and reports call the chain; by default ``path``.
    """
    path: str
    container: nn.Module
    start: int = 0
    stop: int | None = None
    name: str = ''

    def __post_init__(self) -> None:
        object.__setattr__(self, 'name', self.name or self.path)

    @property
    def keys(self) -> list[str]:
        """The blocks' names inside the container, in order."""
        return _children(self.container)[0][self.start:self.stop]

    @property
    def blocks(self) -> list[nn.Module]:
        return _children(self.container)[1][self.start:self.stop]

    @property
    def frozen(self) -> bool:
        """Nothing in the chain learns, so there is nothing to save by replacing."""
        return not any(parameter.requires_grad for block in self.blocks for parameter in block.parameters())

    @cached_property
    def _shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Of every block's parameters, by name, as they were when first asked for: before any block is replaced."""
        return [{name: tuple(p.shape) for name, p in all_parameters(block)} for block in self.blocks]

    def __len__(self) -> int:
        return len(self.keys)

    def block_name(self, index: int) -> str:
        return f'{self.path}.{self.keys[index]}' if self.path else self.keys[index]

    def neighbours(self, index: int, replaced: Collection[int]) -> tuple[int | None, int | None]:
        """Indices of the nearest kept block before and after ``index``; None where the chain ends."""
        before = next((i for i in range(index - 1, -1, -1) if i not in replaced), None)
        after = next((i for i in range(index + 1, len(self)) if i not in replaced), None)
        return before, after

    def sources(self, index: int, replaced: Collection[int] = ()) -> Sources:
        """Which kept blocks offer a tensor of the same name and shape for each tensor of block ``index``.

        On either side it is the nearest kept block; where its tensor has another size, the nearest one that has
        the right size: blocks with global and with windowed attention have position tables of two sizes. A tensor
        for which only one side has one is taken from that side (method.md, RL-v1).
        """
        shapes = self._shapes
        kept = [i for i in range(len(shapes)) if i not in replaced and i != index]
        before, after = [i for i in reversed(kept) if i < index], [i for i in kept if i > index]

        def nearest(candidates: Iterable[int], name: str) -> int | None:
            return next((i for i in candidates if shapes[i].get(name) == shapes[index][name]), None)

        return {name: (nearest(before, name), nearest(after, name)) for name in shapes[index]}

    def why_not(self, index: int, replaced: Collection[int] = ()) -> str | None:
        """Why block ``index`` can't be replaced when the blocks ``replaced`` are; None if it can."""
        if self.frozen:
            return 'its stage is frozen (no parameter learns)'
        before, after = self.neighbours(index, replaced)
        if before is None:
            return 'no kept block before it in its stage'
        if after is None:
            return 'no kept block after it in its stage'
        sources = self.sources(index, replaced)
        for name, sides in sources.items():
            if sides == (None, None):
                shape = self._shapes[index][name]
                return (f'{name} {shape} has no tensor of its shape in a kept block of its stage, such as '
                        f'{self.block_name(before)} or {self.block_name(after)}')
        for side, where in enumerate(('before', 'after')):
            if all(sides[side] is None for sides in sources.values()):
                return f'no kept block {where} it has a tensor of its shapes'
        return None

    def replaceable(self) -> list[int]:
        """The blocks that can be replaced one at a time."""
        return [index for index in range(len(self)) if self.why_not(index) is None]


def _children(container: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """Names and modules of a container's children, a module that stands twice included."""
    named = [(key, child) for key, child in container._modules.items() if child is not None]
    return [key for key, _ in named], [child for _, child in named]


def all_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter slot of ``module``, tied ones under each of their names."""
    return module.named_parameters(remove_duplicate=False)


def find_chains(model: nn.Module) -> dict[str, Chain]:
    """Find the chains of ``model``: runs of residual units of one class that stand one after the other.

    They are looked for among the children of an ``nn.Sequential`` or ``nn.ModuleList``, and among children that a
    module numbers (``b1``, ``b2``, ``b3``). A residual unit has at least two weight tensors (convolution or
    linear), which leaves out lists of single convolutions such as a feature pyramid's, and no chain of three or
    more inside, which leaves out lists of stages. Neighbours share at least one weight's shape.

    Args:
        model: a backbone; in a whole detector, heads made of such lists would be found as well.

    Returns:
        Chains by name, in the model's order. They don't nest. A chain is called like the module that holds it, and
        ``name[start:stop]`` where that one holds several.
    """
    chains: dict[str, Chain] = {}

    def search(module: nn.Module, path: str) -> None:
        runs = _runs(module)
        for start, stop in runs:
            chain = Chain(path, module, start, stop, '' if len(runs) == 1 else f'{path}[{start}:{stop}]')
            chains[chain.name] = chain
        inside = {index for start, stop in runs for index in range(start, stop)}
        for index, (key, child) in enumerate(zip(*_children(module), strict=True)):
            if index not in inside:
                search(child, f'{path}.{key}' if path else key)

    search(model, '')
    return chains


def _runs(module: nn.Module) -> list[tuple[int, int]]:
    """Start and stop of each run of at least two residual units among the children of ``module``."""
    keys, children = _children(module)
    runs, start = [], 0
    for stop in range(1, len(children) + 1):
        if stop < len(children) and _follows(module, keys[stop - 1:stop + 1], children[stop - 1:stop + 1]):
            continue
        if stop - start > 1 and _is_chain(children[start:stop]):
            runs.append((start, stop))
        start = stop
    return runs


def _follows(module: nn.Module, keys: list[str], children: list[nn.Module]) -> bool:
    """Whether the second of two children may continue a run in which the first stands."""
    return type(children[0]) is type(children[1]) and (_is_container(module) or _are_numbered(*keys))


def _are_numbered(key: str, other: str) -> bool:
    (stem, number), (other_stem, other_number) = (re.fullmatch(r'(.*?)(\d*)', name).groups() for name in (key, other))
    return stem == other_stem and '' not in (number, other_number) and int(other_number) == int(number) + 1


def _is_chain(blocks: list[nn.Module]) -> bool:
    return (all(_is_residual_unit(block) for block in blocks)
            and any(_share_a_weight_shape(*pair) for pair in pairwise(blocks)))


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _is_residual_unit(block: nn.Module) -> bool:
    if _is_container(block) or len(_weight_shapes(block)) < 2:
        return False
    return not any(stop - start > 2 for inner in block.modules() for start, stop in _runs(inner))


def _share_a_weight_shape(block: nn.Module, other: nn.Module) -> bool:
    return bool(_weight_shapes(block).items() & _weight_shapes(other).items())


def _weight_shapes(block: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in block.named_parameters() if parameter.ndim >= 2}
