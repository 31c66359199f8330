"""Budget: a plan that replaces as few blocks as bring the model down to a size or to a cost."""
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn

from ..chain import Chain, Choice
from ..checks import is_whole
from ..computing_layer import LayerSettings
from ..operators import FullBlock
from ..registry import OPERATORS, PLANS
from .plan import Plan, add_
from .trial import forward_flops, replaced_twin

logger = logging.getLogger('rl_mmdet')
UNITS = dict(params='learnable parameters', flops='forward FLOPs')


@PLANS.register_module()
class Budget(Plan):
    r"""Replace as few blocks as bring the model down to a number of parameters or of FLOPs.

    .. math:: n = \min \{ n : \mathrm{cost}(\{b_1, …, b_n\}) \le t \}

    with the blocks :math:`b_1, b_2, …` ordered by their distance to the nearer end of their chain, the farthest first;
    of those equally far each chain gives one in turn. A block that would make the choice invalid is passed over. The
    cost is measured on the replaced model, with the fusion and the operator that are set, and is taken to fall with
    every block.

    Args:
        params: t in learnable parameters of the model that is replaced in (the backbone, not the whole detector).
        flops: t in FLOPs of one forward run on 1×3×image_size, in eval mode. Give either this or ``params``: a float
            in (0, 1) is a part of the unreplaced model's, an integer above 1 a number.
        image_size: height and width for ``flops``, in pixels.

    Raises:
        ValueError: neither or both of ``params`` and ``flops``, or a value out of range; when chosen: the model is
            within the budget already, can't be brought there, or can't run on such an image.
    """

    def __init__(self, params: float | None = None, flops: float | None = None,
                 image_size: Sequence[int] = (256, 256)) -> None:
        given = {unit: value for unit, value in dict(params=params, flops=flops).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f'Budget: give either params or flops, got {"both" if given else "neither"} '
                             '(params=0.6 leaves at most 60 % of the learnable parameters)')
        [(self.unit, self.limit)] = given.items()
        if not _is_part(self.limit) and not is_whole(self.limit, 2):
            raise ValueError(f'Budget: {self.unit} must be a float above 0 and below 1 (a part of the unreplaced '
                             f'model\'s) or an integer above 1 (a number), got {self.limit!r}')
        pair = isinstance(image_size, Sequence) and len(image_size) == 2
        if not pair or not all(is_whole(size, 1) for size in image_size):
            raise ValueError(f'Budget: image_size must be (height, width) in pixels, two positive integers, got '
                             f'{image_size!r}')
        self.image_size = tuple(image_size)

    def _choose(self, chains: Mapping[str, Chain], model: nn.Module | None, settings: LayerSettings | None) -> Choice:
        if model is None:
            raise ValueError('Budget: it measures the model, so it needs one; use it as the plan of replace_blocks_()')
        steps = _steps(chains)

        @cache
        def cost(count: int) -> int:
            return self._measure(replaced_twin(model, steps[count], settings))

        if len(steps) == 1:
            return steps[0]
        target = self.limit * cost(0) if _is_part(self.limit) else self.limit
        self._check(cost, target, steps, chains, settings)
        count = bisect_left(range(len(steps)), True, key=lambda count: cost(count) <= target)
        logger.info('%s: %s %s with %s blocks replaced, %s with none', self._name(), f'{cost(count):,}',
                    UNITS[self.unit], count, f'{cost(0):,}')
        return steps[count]

    def _measure(self, model: nn.Module) -> int:
        if self.unit == 'flops':
            return forward_flops(model, self.image_size)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def _check(self, cost: Callable[[int], int], target: float, steps: list[Choice], chains: Mapping[str, Chain],
               settings: LayerSettings | None) -> None:
        start, all_of_them = cost(0), len(steps) - 1
        asked = f'{self._name()} ({target:,.0f} {UNITS[self.unit]})'
        if start <= target:
            raise ValueError(f'{asked} is met without replacing any block: the model has {start:,}; leave '
                             '`replacement` out, or give less')
        if cost(all_of_them) > target:
            lowest = min(start, cost(all_of_them))
            hint = ''
            if self.unit == 'flops' and (settings is None or isinstance(settings.operator, FullBlock)):
                hint = f'; {_instead_of_full_block(chains)}'
            raise ValueError(f'{asked} can\'t be reached: the lowest is {lowest:,} ({lowest / start:.3f} of the '
                             f'unreplaced model\'s), it is {cost(all_of_them):,} with all {all_of_them} candidates '
                             f'replaced{hint}')

    def _name(self) -> str:
        return f'Budget: {self.unit}={self.limit!r}'

    def _arguments(self) -> str:
        size = f', image_size={self.image_size}' if self.unit == 'flops' else ''
        return f'{self.unit}={self.limit!r}{size}'


def _steps(chains: Mapping[str, Chain]) -> list[Choice]:
    """Valid choices of 0, 1, 2 ... blocks, each with one more than that before."""
    ordered = []
    for name, chain in chains.items():
        taken = Counter()
        for index in chain.replaceable():
            distance = min(index, len(chain) - 1 - index)
            ordered.append((-distance, taken[distance], name, index))
            taken[distance] += 1
    steps: list[Choice] = [{name: [] for name in chains}]
    for *_, name, index in sorted(ordered, key=lambda block: block[:2]):
        choice = dict(steps[-1])
        if add_(choice, chains, name, index):
            steps.append(choice)
    return steps


def _instead_of_full_block(chains: Mapping[str, Chain]) -> str:
    """Which operators save forward computation in the place of the chains' blocks."""
    blocks = [block for chain in chains.values() if not chain.frozen for block in chain.blocks]
    fitting = [name for name, cls in OPERATORS.module_dict.items()
               if cls.light and cls.repeatable and any(cls().why_not(block) is None for block in blocks)]
    return ('FullBlock computes all that the removed block did, so it saves no forward computation; '
            + (f'an operator that does, and fits: {", ".join(fitting)}' if fitting else
               'no light operator fits the blocks of this model'))


def _is_part(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < 1
