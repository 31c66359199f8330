"""LearnedPlan: where to replace is learned while the model trains."""
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..replacement import PLANS, ReplacementReport
from ..replacement.chain import Chain
from ..replacement.computing_layer import LayerSettings
from ..replacement.fusions import OwnWeights
from ..replacement.plans import Plan
from ..replacement.surgery import check_fusion, check_some
from .schedule import SearchSchedule
from .search_space import SearchSpace
from .share_limit import ShareLimit


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
        budget, image_size: see :class:`~rl_mmdet.search.share_limit.ShareLimit`; as few blocks are replaced as keep it.
        epochs, iters, seed: see :class:`~rl_mmdet.search.schedule.SearchSchedule`.

    Raises:
        ValueError: a value out of range, or both ``epochs`` and ``iters``; when applied: no choice keeps the budget.

    Source: the policy and its gates are those of SWR, arXiv 2302.13435; choosing blocks to replace by them is ours.
    """
    searches = True

    def __init__(self, budget: Mapping[str, float], epochs: int | None = None, iters: int | None = None, seed: int = 0,
                 image_size: Sequence[int] = (256, 256)) -> None:
        with _named('LearnedPlan'):
            self.limit = ShareLimit(budget, image_size)
            self.schedule = SearchSchedule(epochs, iters, seed)

    def carry_out_(self, model: nn.Module, chains: Mapping[str, Chain], settings: LayerSettings) -> ReplacementReport:
        """Put a computing layer beside every block that can be replaced, in place; a search is to choose."""
        if isinstance(settings.fusion, OwnWeights):
            raise ValueError(f'replacement.plan: {self} chooses what is made of other blocks\' weights, and '
                             f'{settings.fusion} makes nothing; take another fusion or plan')
        if settings.start.keeps_block:
            raise ValueError(f'replacement.start: {settings.start} is a fit before the first step, and {self} chooses '
                             'later; leave start out, and give it to the training with the plan that is found')
        candidates = {name: chain.replaceable() for name, chain in chains.items()}
        check_fusion(chains, candidates, settings.fusion)
        try:
            check_some(chains, candidates, self)
            with _named(self):
                savings = self.limit.savings(chains, model, settings)
        except ValueError as error:
            raise ValueError(f'replacement.plan: {error}') from None
        return ReplacementReport(SearchSpace(model, chains, self, savings, settings).rows)

    def _arguments(self) -> str:
        return f'{self.limit}{self.schedule}'


@contextmanager
def _named(plan: Any) -> Iterator[None]:
    """Put the plan in front of an error's text."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'{plan}: {error}') from error
