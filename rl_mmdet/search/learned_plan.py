"""LearnedPlan: where to replace is learned while the model trains."""
from collections.abc import Mapping

from torch import nn

from ..replacement import PLANS, ReplacementReport
from ..replacement.chain import Chain, Place
from ..replacement.checks import check_number
from ..replacement.computing_layer import LayerSettings
from ..replacement.plans import Plan
from ..replacement.plans.plan import add_
from ..replacement.surgery import check_fusion, check_some
from .schedule import SearchSchedule
from .search_space import SearchSpace
from .transfers import learnable

ROUNDING = 1e-9
"""By how much sums of shares may miss what they stand for; less than a parameter's share."""


@PLANS.register_module()
class LearnedPlan(Plan):
    r"""A policy network learns which blocks are replaced, under a budget, in the first part of a training.

    In that part, the search, every open block computes
    :math:`h_{out} = B(h) + g\,(C(h) - B(h))` with a gate :math:`g ∈ \{0, 1\}` that
    :class:`~rl_mmdet.search.policy.Policy` draws anew in every step; B is the block and C the computing layer that
    could stand there. Weights and policy learn at the same time. From the middle of the search on the gates are settled
    one by one, the most certain first, and of a settled block only B or C runs. When all are settled, the budget is
    kept, and the model becomes the ordinary replaced one of ``plan=dict(type='Blocks', ...)``, which trains on.

    Args:
        budget: ``dict(params=0.7)``, the share of the unreplaced model's learnable parameters that may be left; as few
            blocks are replaced as keep it.
        epochs, iters, seed: see :class:`~rl_mmdet.search.schedule.SearchSchedule`.

    Raises:
        ValueError: a value out of range, or both ``epochs`` and ``iters``; when applied: no choice keeps the budget.

    Source: the policy and its gates are those of SWR, arXiv 2302.13435; choosing blocks to replace by them is ours.
    """
    searches = True

    def __init__(self, budget: Mapping[str, float], epochs: int | None = None, iters: int | None = None,
                 seed: int = 0) -> None:
        if not isinstance(budget, Mapping) or set(budget) != {'params'}:
            raise ValueError(f'LearnedPlan: budget must be a dict such as dict(params=0.7), got {budget!r}')
        self.share = check_number('LearnedPlan: budget.params', budget['params'], above=0, below=1,
                                  hint='a share of the unreplaced model\'s learnable parameters')
        try:
            self.schedule = SearchSchedule(epochs, iters, seed)
        except ValueError as error:
            raise ValueError(f'LearnedPlan: {error}') from None

    def carry_out_(self, model: nn.Module, chains: Mapping[str, Chain], settings: LayerSettings) -> ReplacementReport:
        """Put a computing layer beside every block that can be replaced, in place; a search is to choose."""
        if settings.start.keeps_block:
            raise ValueError(f'replacement.start: {settings.start} is a fit before the first step, and {self} chooses '
                             'later; leave start out, and give it to the training with the plan that is found')
        candidates = {name: chain.replaceable() for name, chain in chains.items()}
        check_fusion(chains, candidates, settings.fusion)
        try:
            check_some(chains, candidates, self)
            savings = self._savings(chains, model, settings)
        except ValueError as error:
            raise ValueError(f'replacement.plan: {error}') from None
        return ReplacementReport(SearchSpace(model, chains, self, savings, settings).rows)

    def _savings(self, chains: Mapping[str, Chain], model: nn.Module, settings: LayerSettings) -> dict[Place, float]:
        """Which share each block saves when it is replaced; only blocks that save something.

        Raises:
            ValueError: too much is left with all of them replaced, or the fusion makes nothing.
        """
        self._check_makes(settings.fusion)
        whole = sum(parameter.numel() for _, parameter in learnable(model))
        savings, most = {}, {name: [] for name in chains}
        for chain in chains.values():
            for index in chain.replaceable():
                block, untouched, made = chain.blocks[index], chain.untouched(index), chain.shapes_to_make(index)
                gone = sum(parameter.numel() for name, parameter in learnable(block) if name not in untouched)
                start = (settings.fusion.start(made) if made else {}) | settings.operator.start(block)
                saved = gone - sum(tensor.numel() for tensor in start.values())
                if saved > 0:
                    savings[Place(chain, index)] = saved / whole
                    add_(most, chains, chain.name, index)
        lowest = 1 - sum(saving for place, saving in savings.items() if place.index in most[place.chain.name])
        if lowest > self.share + ROUNDING:
            raise ValueError(f'{self}: the budget can\'t be reached: with {sum(map(len, most.values()))} blocks '
                             f'replaced, all that save something, {lowest:.3f} of the unreplaced model\'s learnable '
                             'parameters are left')
        return savings

    def _arguments(self) -> str:
        return f'budget=dict(params={self.share}){self.schedule}'
