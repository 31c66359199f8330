"""The search for a plan: a policy learns which of a model's open blocks are replaced."""
import logging
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..folding import unfold_norm_
from ..replacement import ReplacementReport, computing_layers
from ..replacement.chain import Choice
from ..replacement.plans.trial import copy_around_parameters
from .found import Found
from .policy import Unit
from .search_space import NAME, SearchSpace, finish_search_

logger = logging.getLogger('rl_mmdet')


class BlockSearch:
    """Draws the gates of a model's open blocks step by step, and learns which should be open.

    Args:
        model: that :func:`~rl_mmdet.replacement.replace_blocks_` has prepared for a
            :class:`~rl_mmdet.search.learned_plan.LearnedPlan`.
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
        >>> report = search.finish_(search.decide()[0])
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        plan = self.space.plan
        self.policy = plan.settings.policy(_units(self.space), plan.limit.share - 1, steps, plan.limit.share)
        for index, saving in enumerate(self.space.savings):
            if saving <= 0:
                self.policy.settle(index, False)
        self.leaves: list[Tensor] = []

    @property
    def space(self) -> SearchSpace:
        return getattr(self.model, NAME)

    @property
    def done(self) -> bool:
        """Whether all gates are settled, and the model can become the replaced one."""
        return self.policy.step >= self.policy.steps

    def sample(self) -> list[bool]:
        """Draw gates for one step of training and set them; blocks that can't be replaced together give way."""
        gates = self._that_fit(self.policy.sample())
        device = next(self.model.parameters()).device
        self.leaves = [torch.zeros((), device=device, requires_grad=True) for _ in gates]
        self.space.set_gates(gates, self.leaves, [gate is not None for gate in self.policy.settled])
        return gates

    def learn(self, reduce: Callable[[Tensor], None] | None = None, share: Callable[[Tensor], None] | None = None
              ) -> None:
        """Learn from the gradients that a backward run has left at the gates.

        Args:
            reduce: averages a tensor over processes, in place.
            share: makes a tensor the first process's in all others, in place.
        """
        zero = torch.zeros((), device=self.leaves[0].device)
        gradient = torch.stack([zero if leaf.grad is None else leaf.grad for leaf in self.leaves])
        if reduce is not None:
            reduce(gradient)
        self.policy.learn(gradient, share)
        self.policy.settle_due(self.best)

    def best(self) -> list[bool]:
        """The gates of the choice that would be made now; it keeps the budget, as far as savings add up."""
        return self.policy.best(self.space.fits)

    def show_best(self) -> None:
        """Let the model compute what it would with that choice, until the next sample: for validation."""
        self.space.set_gates(self.best())

    def decide(self) -> tuple[Choice, float]:
        """The choice to finish with, and what it leaves of the unreplaced model's budgeted quantity: measured.

        Where savings don't quite add up, the most probable of the other blocks are replaced as well.
        """
        gates = self.best()
        left, limit = self.measure(gates), self.space.plan.limit.share
        for index in self.policy.scores.argsort(descending=True).tolist():
            tried = [gate or number == index for number, gate in enumerate(gates)]
            if left > limit and not gates[index] and self.space.savings[index] > 0 and self.space.fits(tried):
                gates, left = tried, self.measure(tried)
        if left > limit:
            logger.warning('%s: the budget is not kept: %.4f are left with all blocks replaced that go together',
                           self.space.plan, left)
        return self.space.choice(gates), left

    def measure(self, gates: list[bool]) -> float:
        """What is left of the budgeted quantity with this choice, as a share of the unreplaced model's."""
        return self._measure(gates) / self._whole

    @cached_property
    def _whole(self) -> float:
        return self._measure([False] * len(self.space.places))

    def finish_(self, choice: Choice, *copies: nn.Module) -> ReplacementReport:
        """Turn the model, and copies of it, into the replaced ones; see :func:`~.search_space.finish_search_`."""
        for other in copies:
            finish_search_(other, choice)
        return finish_search_(self.model, choice)

    def conclude_(self, *copies: nn.Module) -> Found:
        """:meth:`decide`, then :meth:`finish_`. BatchNorm that doesn't train wants new statistics afterwards."""
        plan = self.space.plan
        choice, left = self.decide()
        report = self.finish_(choice, *copies)
        self.model.replacement_report = report
        for layer in computing_layers(self.model).values():
            layer.norm_stale = True  # of other neighbours, as long as gates were drawn
        text = f'{plan}: {left:.4f} of the {plan.limit.name} are left\n{report}'
        return Found(dict(plan=dict(type='Blocks', blocks=report.replaced)), text)

    def scalars(self) -> dict[str, float]:
        """The probability of every block to be replaced."""
        names = [unit.name for unit in self.policy.units]
        return dict(zip(names, self.policy.probabilities().tolist(), strict=True))

    @property
    def settled(self) -> int:
        """How many gates don't change any more."""
        return self.policy.count_settled()

    def state_dict(self) -> dict[str, Any]:
        return self.policy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`~.policy.Policy.load_state_dict`."""
        self.policy.load_state_dict(state)

    def _that_fit(self, gates: list[bool]) -> list[bool]:
        if self.space.fits(gates):
            return gates
        fitting = [bool(gate) for gate in self.policy.settled]
        for index in self.policy.scores.argsort(descending=True).tolist():
            tried = [gate or number == index for number, gate in enumerate(fitting)]
            if gates[index] and self.space.fits(tried):
                fitting = tried
        return fitting

    def _measure(self, gates: list[bool]) -> float:
        twin = copy_around_parameters(self.model)
        finish_search_(twin, self.space.choice(gates))
        unfold_norm_(twin)  # savings were measured without
        twin.eval()
        return self.space.plan.limit.measure(twin)


def _units(space: SearchSpace) -> list[Unit]:
    chains = list(space.chains.values())
    before = dict(zip(space.chains, accumulate(map(len, chains), initial=0), strict=False))
    last = max(1, sum(map(len, chains)) - 1)
    rows = {row.name: row for row in space.rows}
    return [Unit(place.name, place.chain.name, (before[place.chain.name] + place.index) / last,
                 rows[place.name].kind, rows[place.name].parameters, min(-saving, -1e-9))
            for place, saving in zip(space.places, space.savings, strict=True)]
