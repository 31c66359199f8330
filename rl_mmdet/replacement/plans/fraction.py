"""Replace a fraction of the blocks, spread evenly."""
import math
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..chain import Chain, Choice
from ..checks import check_number
from ..computing_layer import LayerSettings
from ..registry import PLANS
from .plan import Plan, add_

OF_ALL = '0.25 replaces a quarter of the blocks that can be replaced'


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
        self.p = check_number('Fraction: p', p, above=0, most=1, hint=OF_ALL)

    def _choose(self, chains: Mapping[str, Chain], model: nn.Module | None, settings: LayerSettings | None) -> Choice:
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

    def _arguments(self) -> str:
        return f'p={self.p}'


def count_of(p: float, candidates: Mapping[str, Sequence[int]]) -> int:
    """How many blocks the fraction p of all candidates is: rounded, but at least one."""
    return max(1, math.floor(p * sum(map(len, candidates.values())) + 0.5))


def _shares(count: int, candidates: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """``count`` blocks in proportion to the chains' candidates, by largest remainders; of equal ones the first."""
    total = max(1, sum(map(len, candidates.values())))
    divided = {name: divmod(min(count, total) * len(indices), total) for name, indices in candidates.items()}
    shares = {name: whole for name, (whole, _) in divided.items()}
    left = sum(remainder for _, remainder in divided.values()) // total
    for name in sorted(divided, key=lambda name: -divided[name][1])[:left]:
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
