"""The search for a plan: a policy learns which of a model's open blocks are replaced."""
import logging
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..replacement import computing_layers
from ..replacement.chain import Choice
from .learned_plan import ROUNDING
from .policy import Policy
from .search_base import Collective, Search, SearchResult
from .search_space import NAME, SearchSpace, finish_search_
from .units import Unit

logger = logging.getLogger('rl_mmdet')


class BlockSearch(Search):
    """Learns which of a model's open blocks are replaced (:class:`~.learned_plan.LearnedPlan`).

    Args:
        model: that :func:`~rl_mmdet.replacement.replace_blocks_` has prepared for such a plan.
        steps: length of the search.

    Example:
        >>> replace_blocks_(model, dict(plan=dict(type='LearnedPlan', budget=dict(params=0.7))))
        >>> search = BlockSearch(model, steps=1000)
        >>> while not search.done:
        ...     search.sample()
        ...     loss(model(images)).backward()
        ...     search.learn()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> found, text = search.conclude_()
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        space: SearchSpace = getattr(model, NAME)
        share = space.plan.share
        super().__init__(model, Policy(_units(space), share - 1, steps, share / 100, space.plan.schedule.seed,
                                       space.fits))
        self.leaves: list[Tensor] = []
        """One number per gate, which gets the gradient with respect to it in backward."""

    @property
    def space(self) -> SearchSpace:
        return getattr(self.model, NAME)

    def sample(self) -> list[bool]:
        gates = self.policy.sample()
        device = next(self.model.parameters()).device
        self.leaves = [torch.zeros((), device=device, requires_grad=True) for _ in gates]
        self.space.set_gates(gates, self.leaves, (~self.policy.settled.isnan()).tolist())
        return gates

    def learn(self, reduce: Collective | None = None, share: Collective | None = None) -> None:
        gradient = torch.stack([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves])
        if reduce is not None:
            reduce(gradient)
        self.policy.learn(gradient, share)

    def show_best(self) -> None:
        self.space.set_gates(self.best())

    def decide(self) -> tuple[Choice, float]:
        """The blocks to replace, and how much they leave of the learnable parameters, as a share."""
        gates = self.best()
        left = 1 + self.policy.weight(gates)
        if left > self.space.plan.share + ROUNDING:
            logger.warning('%s: the budget is not kept: %.4f are left with all blocks replaced that go together',
                           self.space.plan, left)
        return self.space.choice(gates), left

    def conclude_(self, *copies: nn.Module) -> SearchResult:
        """As in :class:`~.search_base.Search`. BatchNorm that doesn't train wants new statistics afterwards."""
        plan = self.space.plan
        choice, left = self.decide()
        for other in copies:
            finish_search_(other, choice)
        report = self.model.replacement_report = finish_search_(self.model, choice)
        for layer in computing_layers(self.model).values():
            layer.norm_stale = True  # its statistics are a mixture over the neighbours that it had while searching
        text = f'{plan}: {left:.4f} of the learnable parameters are left\n{report}'
        return SearchResult(dict(plan=dict(type='Blocks', blocks=report.replaced)), text)


def _units(space: SearchSpace) -> list[Unit]:
    """The open blocks as units; each weighs what replacing it saves, with a minus sign."""
    chains = list(space.chains.values())
    before = dict(zip(space.chains, accumulate(map(len, chains), initial=0), strict=False))
    last = max(1, sum(map(len, chains)) - 1)
    rows = {row.name: row for row in space.rows}
    return [Unit(place.name, place.chain.name, (before[place.chain.name] + place.index) / last, rows[place.name].kind,
                 rows[place.name].parameters, -saving)
            for place, saving in zip(space.places, space.savings, strict=True)]
