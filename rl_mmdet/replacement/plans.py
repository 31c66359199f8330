"""Plans: where; which blocks of which chains are replaced."""
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .chain import Chain
from .registry import PLANS

Choice = dict[str, list[int]]
"""Block indices to replace, by chain name."""


class Plan:
    """What all plans share: they choose blocks, and show what they have chosen last.

    Attributes:
        chosen: the last choice, None before the first.
        searches: the choice is made while the model trains, see :mod:`~rl_mmdet.replacement.search_space`.
    """
    chosen: Choice | None = None
    searches = False

    def choose(self, chains: Mapping[str, Chain], model: nn.Module | None = None,
               parts: Mapping[str, Any] | None = None) -> Choice:
        """Which blocks to replace. Nothing is changed, neither ``chains`` nor ``model``.

        Args:
            chains: of the model, before any block is replaced.
            model: for plans that measure it.
            parts: for plans that try a replacement: the fusion, operator and gradient to try it with.

        Returns:
            Block indices by chain name, in order; every chain is named.

        Raises:
            ValueError: the plan doesn't fit the model.
        """
        self.chosen = self._choose(chains, model, parts or {})
        return {name: list(indices) for name, indices in self.chosen.items()}

    def savings(self, chains: Mapping[str, Chain], model: nn.Module, parts: Mapping[str, Any]) -> list[float]:
        """What replacing each block that can be replaced would save; of plans that search. Arguments as above.

        Raises:
            ValueError: the plan doesn't fit the model.
        """
        raise NotImplementedError

    def _choose(self, chains: Mapping[str, Chain], model: nn.Module | None, parts: Mapping[str, Any]) -> Choice:
        raise NotImplementedError

    def _settings(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        blocks = {name: indices for name, indices in (self.chosen or {}).items() if indices}
        return f'{type(self).__name__}({self._settings()})' + (f': {as_blocks(blocks)}' if blocks else '')


@PLANS.register_module()
class EveryKth(Plan):
    r"""In every chain, replace the blocks :math:`i` with :math:`i \bmod k = o` that can be replaced.

    Blocks count from 0, the first block of a stage. Chains that are frozen, and blocks that have no kept
    neighbours or no tensors of their shapes (first and last of a stage), are left alone.

    Args:
        k: distance between replaced blocks, at least 2.
        offset: :math:`o`, from 0 to ``k - 1``.

    Raises:
        ValueError: ``k`` or ``offset`` out of range.
    """

    def __init__(self, k: int, offset: int = 1) -> None:
        if not _is_index(k) or k < 2:
            raise ValueError(f'EveryKth: k must be an integer of at least 2, got {k!r} '
                             '(k=2 replaces every other block, k=4 every fourth)')
        if not _is_index(offset) or not 0 <= offset < k:
            raise ValueError(f'EveryKth: offset must be an integer from 0 to k - 1 = {k - 1}, got {offset!r}')
        self.k = k
        self.offset = offset

    def _choose(self, chains: Mapping[str, Chain], model: nn.Module | None, parts: Mapping[str, Any]) -> Choice:
        return {name: [i for i in chain.replaceable() if i % self.k == self.offset]
                for name, chain in chains.items()}

    def _settings(self) -> str:
        return f'k={self.k}, offset={self.offset}'


@PLANS.register_module()
class Blocks(Plan):
    """Replace exactly the blocks that are named.

    Args:
        blocks: block indices by chain name, e.g. ``{'layer3': [1, 3]}``. Neighbouring blocks may both be named:
            each then takes the nearest *kept* blocks around it.

    Raises:
        TypeError: not a dict of lists of integers.
        ValueError: nothing is named, or a block is named twice; when chosen: an unknown stage or index.
    """

    def __init__(self, blocks: Mapping[str, Sequence[int]]) -> None:
        if not isinstance(blocks, Mapping):
            raise TypeError(f"Blocks: blocks must be a dict such as {{'layer3': [1, 3]}}, got {blocks!r}")
        for name, indices in blocks.items():
            if isinstance(indices, str) or not isinstance(indices, Sequence) or not all(map(_is_index, indices)):
                raise TypeError(f'Blocks: {name!r} must map to a list of block indices, got {indices!r}')
            if len(set(indices)) != len(indices):
                raise ValueError(f'Blocks: {name!r} names a block twice: {list(indices)}')
        if not any(blocks.values()):
            raise ValueError('Blocks: no block is named; leave `replacement` out to train the unmodified backbone')
        self.blocks = {name: sorted(indices) for name, indices in blocks.items()}

    def _choose(self, chains: Mapping[str, Chain], model: nn.Module | None, parts: Mapping[str, Any]) -> Choice:
        for name, indices in self.blocks.items():
            if name not in chains:
                raise ValueError(f'Blocks: there is no stage {name!r}; {describe_replaceable(chains)}')
            for index in indices:
                if not 0 <= index < len(chains[name]):
                    raise ValueError(f'Blocks: {name} has no block {index}, its blocks are 0 to '
                                     f'{len(chains[name]) - 1}; {describe_replaceable(chains)}')
        return {name: list(self.blocks.get(name, [])) for name in chains}

    def __repr__(self) -> str:
        return f'Blocks({self.blocks})'


@PLANS.register_module()
class Fraction(Plan):
    r"""Replace the fraction p of all blocks that can be replaced, spread evenly over the model.

    .. math:: n = \max(1, ⌊pR + \tfrac12⌋), \qquad n_c ≈ n R_c / R

    with R blocks that can be replaced, :math:`R_c` of them in chain c; what rounding leaves goes to the largest
    remainders. Inside a chain the blocks are spread evenly, side by side only where there is no other way. A block that
    would leave another one without what it needs gives way to the nearest that doesn't; where there is none, the
    model gets fewer than n.

    Args:
        p: above 0, at most 1.

    Raises:
        ValueError: ``p`` out of range.
    """

    def __init__(self, p: float) -> None:
        self.p = check_part('Fraction', 'p', p)

    def _choose(self, chains: Mapping[str, Chain], model: nn.Module | None, parts: Mapping[str, Any]) -> Choice:
        candidates = {name: chain.replaceable() for name, chain in chains.items()}
        count = count_of(self.p, candidates)
        choice: Choice = {name: [] for name in chains}
        for name, share in _shares(count, candidates).items():
            for wanted in _spread(candidates[name], share):
                _add_nearest_(choice, chains, name, wanted, candidates[name])
        for name, index in ((name, index) for name, indices in candidates.items() for index in indices):
            if sum(map(len, choice.values())) < count:
                add_(choice, chains, name, index)
        return choice

    def _settings(self) -> str:
        return f'p={self.p}'


def as_blocks(choice: Mapping[str, Sequence[int]]) -> str:
    """A choice as the setting that asks for just these blocks."""
    return f"dict(type='Blocks', blocks={dict(choice)})"


def add_(choice: Choice, chains: Mapping[str, Chain], name: str, index: int) -> bool:
    """Add a block to a valid choice, unless it is there or would make the choice invalid; returns whether it did."""
    tried = choice | {name: sorted([*choice[name], index])}
    if index in choice[name] or any(chains[chain].why_not(block, tried) for chain in tried for block in tried[chain]):
        return False
    choice[name] = tried[name]
    return True


def check_part(plan: str, argument: str, value: Any) -> float:
    """``value`` if it is a number above 0 and at most 1, else a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f'{plan}: {argument} must be a number above 0 and at most 1, got {value!r} '
                         '(0.25 replaces a quarter of the blocks that can be replaced)')
    return value


def count_of(p: float, candidates: Mapping[str, Sequence[int]]) -> int:
    """How many blocks the fraction p of all candidates is: rounded, but at least one."""
    return max(1, math.floor(p * sum(map(len, candidates.values())) + 0.5))


def describe_replaceable(chains: Mapping[str, Chain]) -> str:
    """One phrase that names every block which can be replaced, for error messages."""
    parts = [f'{name}: {chain.replaceable()}' for name, chain in chains.items() if chain.replaceable()]
    if parts:
        return 'blocks that can be replaced: ' + ', '.join(parts)
    reasons = dict.fromkeys(chain.why_not(len(chain) // 2) for chain in chains.values() if not chain.frozen)
    return 'blocks that can be replaced: none' + (f' ({"; ".join(reasons)})' if reasons else '')


def _shares(count: int, candidates: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """``count`` blocks in proportion to the chains' candidates, by largest remainders; of equal ones the first."""
    total = max(1, sum(map(len, candidates.values())))
    parts = {name: divmod(min(count, total) * len(indices), total) for name, indices in candidates.items()}
    shares = {name: whole for name, (whole, _) in parts.items()}
    left = sum(remainder for _, remainder in parts.values()) // total
    for name in sorted(parts, key=lambda name: -parts[name][1])[:left]:
        shares[name] += 1
    return shares


def _spread(candidates: Sequence[int], count: int) -> list[int]:
    """``count`` of the candidates, each in the middle of an equal part of them, and side by side as few as can be."""
    chosen = {candidates[(2 * part + 1) * len(candidates) // (2 * count)] for part in range(count)}
    for index in sorted(chosen):
        others = chosen - {index}
        free = [other for other in candidates if other not in chosen and not _beside(other, others)]
        if free and _beside(index, others):
            chosen = others | {min(free, key=lambda other: abs(other - index))}
    return sorted(chosen)


def _beside(index: int, others: Iterable[int]) -> bool:
    return any(abs(index - other) == 1 for other in others)


def _add_nearest_(choice: Choice, chains: Mapping[str, Chain], name: str, wanted: int, candidates: list[int]) -> None:
    """Add the candidate that is wanted, or the nearest one with which the choice stays valid, if there is one."""
    for index in sorted(candidates, key=lambda index: abs(index - wanted)):
        if add_(choice, chains, name, index):
            return


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
