"""Chains: the ordered blocks of one stage, who is kept, and who are a block's neighbours."""
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Optional

from torch import nn

from .block_structure import all_parameters
from .resize import Shape, can_resize

Choice = dict[str, list[int]]
"""Block indices to replace, by chain name."""


class Place(NamedTuple):
    """Where a block stands: its chain, and its index there."""
    chain: 'Chain'
    index: int

    @property
    def name(self) -> str:
        return self.chain.block_name(self.index)

    @property
    def block(self) -> nn.Module:
        return self.chain.blocks[self.index]


Donors = dict[str, tuple[Place | None, Place | None]]
"""For every tensor name of a block: where the kept blocks before and after it stand whose tensors are used, if any."""


@dataclass(frozen=True, eq=False)
class Chain:
    """The ordered blocks of one stage (or of a whole plain ViT).

    Args:
        path: qualified name of the module that holds the blocks, e.g. ``'layer3'``.
        container: that module.
        start, stop: which of its children are the blocks; all by default.
        name: how plans and reports call the chain; by default ``path``.
        adapt: a tensor of another size may be used where a kept block has none of the right size, and a kept block
            of a neighbouring stage where the own one has none (RL-v2; see :mod:`~rl_mmdet.replacement.resize`).
        operator: decides which blocks it can stand for, and which of their tensors it needs; None takes all.

    Attributes:
        places: in how many places of the model each of its modules stands, by id.
        beside: the chain before and after this one in the model whose blocks are of the same class, if any.
    """
    path: str
    container: nn.Module
    start: int = 0
    stop: int | None = None
    name: str = ''
    adapt: bool = False
    operator: Any = None
    places: Counter[int] = field(default_factory=Counter, repr=False)
    beside: list[Optional['Chain']] = field(default_factory=lambda: [None, None], repr=False)

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
        return not any(map(_learns, self.blocks))

    @cached_property
    def _shapes(self) -> list[dict[str, Shape]]:
        """Of every block's parameters, by name, as they were when first asked for: before any block is replaced."""
        return [{name: tuple(p.shape) for name, p in all_parameters(block)} for block in self.blocks]

    @cached_property
    def _refused(self) -> list[str | None]:
        """Why a block can't be replaced, whatever the others are; None where it can; as it was when first asked for."""
        return [self._why_shared(block) or (None if _learns(block) else 'it is frozen (no parameter learns)')
                or (self.operator and self.operator.why_not(block)) for block in self.blocks]

    def _why_shared(self, block: nn.Module) -> str | None:
        inside = _count_places(block)
        name = next((name for name, each in block.named_modules() if self.places[id(each)] > inside[id(each)]
                     and next(each.parameters(), None) is not None), None)
        return None if name is None else f'{f"its {name}" if name else "it"} also stands in another place of the model'

    @cached_property
    def _needed(self) -> list[dict[str, Shape]]:
        """The tensors that are to be made for each block, and their shapes; as it was when first asked for."""
        return [shapes if self.operator is None else self.operator.needs(block) if reason is None else {}
                for block, shapes, reason in zip(self.blocks, self._shapes, self._refused, strict=True)]

    def __len__(self) -> int:
        return len(self.keys)

    def block_name(self, index: int) -> str:
        return f'{self.path}.{self.keys[index]}' if self.path else self.keys[index]

    def neighbours(self, index: int, choice: Choice | None = None) -> tuple[Place | None, Place | None]:
        """The nearest kept blocks before and after block ``index``; None where the chain ends.

        Args:
            index: the block.
            choice: which blocks are replaced, by chain name.
        """
        return tuple(next(iter(side), None) for side in self._kept(index, choice or {}))

    def donors(self, index: int, choice: Choice | None = None) -> Donors:
        """Which kept blocks give a tensor of the same name and shape for each tensor that block ``index`` needs.

        On either side it is the nearest kept block; where its tensor has another size, the nearest one of the
        chain that has the right size: blocks with global and with windowed attention have position tables of two
        sizes. With ``adapt``, and only where the chain has none, the nearest one of any size. A tensor for which
        only one side has one is taken from that side.
        """
        before, after = self._kept(index, choice or {})
        return {name: (self._nearest(before, name, index), self._nearest(after, name, index))
                for name in self._needed[index]}

    @property
    def only(self) -> tuple[str, ...]:
        """Names of the submodules that are replaced, where it isn't whole blocks."""
        return () if self.operator is None else self.operator.only

    def untouched(self, index: int) -> frozenset[str]:
        """Names of the tensors that block ``index``, which stands there still, keeps when it is replaced."""
        return frozenset() if self.operator is None else self.operator.untouched(self.blocks[index])

    def shapes_to_make(self, index: int) -> dict[str, Shape]:
        """The tensors that are to be made for block ``index``, by name."""
        return dict(self._needed[index])

    def why_not(self, index: int, choice: Choice | None = None) -> str | None:
        """Why block ``index`` can't be replaced when the blocks of ``choice`` are; None if it can."""
        if self.frozen:
            return 'its stage is frozen (no parameter learns)'
        if self._refused[index] is not None:
            return self._refused[index]
        beside = self.neighbours(index, choice)
        if beside == (None, None) or (None in beside and not self.adapt):
            where = 'model' if self.adapt else 'stage'
            return f'no kept block {"before" if beside[0] is None else "after"} it in its {where}'
        donors = self.donors(index, choice)
        for name, sides in donors.items():
            if sides == (None, None):
                shape = self._shapes[index][name]
                names = ' or '.join(place.name for place in beside if place is not None)
                if self.adapt:
                    return f'no kept block has a tensor {name}, so {shape} can\'t be made (the nearest: {names})'
                return f'{name} {shape} has no tensor of its shape in a kept block of its stage, such as {names}'
        for side, where in enumerate(('before', 'after')):
            if donors and not self.adapt and all(sides[side] is None for sides in donors.values()):
                return f'no kept block {where} it has a tensor of its shapes'
        return None

    def replaceable(self) -> list[int]:
        """The blocks that can be replaced one at a time."""
        return [index for index in range(len(self)) if self.why_not(index) is None]

    def _kept(self, index: int, choice: Choice) -> tuple[list[Place], list[Place]]:
        """The kept blocks before and after block ``index``, the nearest first; with ``adapt`` of all stages."""
        places = [place for place in self._places() if place == (self, index)
                  or place.index not in choice.get(place.chain.name, ())]
        here = places.index(Place(self, index))
        return places[:here][::-1], places[here + 1:]

    def _places(self) -> list[Place]:
        """The places of the chain's blocks in the model's order; with ``adapt`` those of the chains beside it, too."""
        chains = [self]
        while self.adapt and chains[0].beside[0] is not None:
            chains.insert(0, chains[0].beside[0])
        while self.adapt and chains[-1].beside[1] is not None:
            chains.append(chains[-1].beside[1])
        return [Place(chain, index) for chain in chains for index in range(len(chain))]

    def _nearest(self, places: list[Place], name: str, index: int) -> Place | None:
        """The nearest of ``places`` that has tensor ``name`` of block ``index``."""
        shape = self._shapes[index][name]
        same = next((p for p in places if p.chain is self and self._shapes[p.index].get(name) == shape), None)
        if same is not None or not self.adapt:
            return same
        return next((p for p in places if can_resize(p.chain._shapes[p.index].get(name), shape)), None)


def _learns(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def _children(container: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """Names and modules of a container's children, a module that stands twice included."""
    named = [(key, child) for key, child in container._modules.items() if child is not None]
    return [key for key, _ in named], [child for _, child in named]


def _count_places(model: nn.Module) -> Counter[int]:
    """In how many places of a model each of its modules stands, by id."""
    return Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))


def find_chains(model: nn.Module, adapt: bool = False, operator: Any = None) -> dict[str, Chain]:
    """Find the chains of ``model``: runs of residual units of one class that stand one after the other.

    They are looked for among the children of an ``nn.Sequential`` or ``nn.ModuleList``, and among children that a
    module numbers (``b1``, ``b2``, ``b3``). A residual unit has at least two weight tensors (convolution or
    linear), which leaves out lists of single convolutions such as a feature pyramid's, and no chain of three or
    more inside, which leaves out lists of stages. Neighbours share at least one weight's shape.

    Args:
        model: a backbone; in a whole detector, heads made of such lists would be found as well.
        adapt, operator: see :class:`Chain`.

    Returns:
        Chains by name, in the model's order. They don't nest. A chain is called like the module that holds it, and
        ``name[start:stop]`` where that one holds several.
    """
    chains: dict[str, Chain] = {}
    places = _count_places(model)

    def search(module: nn.Module, path: str) -> None:
        runs = _runs(module)
        for start, stop in runs:
            name = '' if len(runs) == 1 else f'{path}[{start}:{stop}]'
            chain = Chain(path, module, start, stop, name, adapt, operator, places)
            chains[chain.name] = chain
        inside = {index for start, stop in runs for index in range(start, stop)}
        for index, (key, child) in enumerate(zip(*_children(module), strict=True)):
            if index not in inside:
                search(child, f'{path}.{key}' if path else key)

    search(model, '')
    for kind in {type(chain.blocks[0]) for chain in chains.values()}:
        for chain, other in pairwise(chain for chain in chains.values() if type(chain.blocks[0]) is kind):
            chain.beside[1], other.beside[0] = other, chain
    return chains


def as_blocks(choice: Choice) -> str:
    """A choice as the setting that asks for just these blocks."""
    return f"dict(type='Blocks', blocks={dict(choice)})"


def describe_replaceable(chains: dict[str, Chain]) -> str:
    """One phrase that names every block which can be replaced, for error messages."""
    named = [f'{name}: {chain.replaceable()}' for name, chain in chains.items() if chain.replaceable()]
    if named:
        return 'blocks that can be replaced: ' + ', '.join(named)
    learning = [chain for chain in chains.values() if not chain.frozen] or chains.values()
    reasons = dict.fromkeys(chain.why_not(len(chain) // 2) for chain in learning)
    return 'blocks that can be replaced: none' + (f' ({"; ".join(reasons)})' if reasons else '')


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


def _weight_shapes(block: nn.Module) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in block.named_parameters() if parameter.ndim >= 2}
