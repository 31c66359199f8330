"""LearnedPlan: where to replace is learned while the model trains; and the random choice to compare it with."""
import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..replacement import PLANS, Chain
from ..replacement.plans import Choice, Plan, add_
from .plan_budget import PlanBudget, is_number, is_pair, is_whole


@PLANS.register_module()
class LearnedPlan(Plan):
    r"""A policy network learns which blocks are replaced, so that a budget is kept, in the first part of a training.

    In that part, the search, every block that can be replaced computes
    :math:`h_{out} = B(h) + g\,(C(h) - B(h))` with a gate :math:`g ∈ \{0, 1\}` that
    :class:`~rl_mmdet.policy.policy.Policy` draws anew in every step; C is the computing layer that could stand there.
    Weights and policy learn at the same time. From the middle of the search on the gates are settled one by one, the
    most certain first, and a settled block runs one branch only. At its end all are, the budget is kept, and the model
    becomes the ordinary replaced one of ``plan=dict(type='Blocks', ...)``, which trains on.

    Args:
        budget, image_size: see :class:`~rl_mmdet.policy.plan_budget.PlanBudget`; as few blocks are replaced as keep it.
        epochs, iters: length of the search; give one, or none for the first half of the training.
        temperature: of the policy, at the first and at the last step.
        lr: of the policy.
        seed: of the policy.

    Raises:
        ValueError: a value out of range, or both ``epochs`` and ``iters``; when applied: no choice reaches the budget.

    Source: the policy and its gates are those of SWR, arXiv 2302.13435; choosing blocks to replace by them is ours.
    """
    searches = True

    def __init__(self, budget: Mapping[str, float], epochs: int | None = None, iters: int | None = None,
                 temperature: Sequence[float] = (1., 0.2), lr: float = 0.03, seed: int = 0,
                 image_size: Sequence[int] = (256, 256)) -> None:
        if epochs is not None and iters is not None:
            raise ValueError(f'LearnedPlan: epochs={epochs!r} and iters={iters!r} both say how long the search is; '
                             'leave one out')
        for name, value in dict(epochs=epochs, iters=iters).items():
            if value is not None and not is_whole(value, 1):
                raise ValueError(f'LearnedPlan: {name} must be an integer of at least 1, got {value!r}')
        if not is_pair(temperature) or not all(is_number(t) and t > 0 for t in temperature):
            raise ValueError(f'LearnedPlan: temperature must be two numbers above 0, got {temperature!r}')
        if not is_number(lr) or lr <= 0:
            raise ValueError(f'LearnedPlan: lr must be a number above 0, got {lr!r}')
        self.budget = _budget('LearnedPlan', budget, image_size)
        self.epochs, self.iters = epochs, iters
        self.temperature, self.lr, self.seed = tuple(temperature), lr, _seed('LearnedPlan', seed)

    def savings(self, chains: Mapping[str, Chain], model: nn.Module, parts: Mapping[str, Any]) -> list[float]:
        """What replacing each block alone saves, as a part of the unreplaced model's; negative if it costs more."""
        return _savings(self, chains, model, parts)

    def _settings(self) -> str:
        length = ''.join(f', {name}={value}' for name, value in dict(epochs=self.epochs, iters=self.iters).items()
                         if value is not None)
        return f'{self.budget}{length}'


@PLANS.register_module()
class RandomPlan(Plan):
    """Blocks drawn at random, as many as keep a budget: what a :class:`LearnedPlan` has to beat.

    Args:
        budget, image_size: see :class:`~rl_mmdet.policy.plan_budget.PlanBudget`.
        seed: of the draw.

    Raises:
        ValueError: a value out of range; when chosen: no choice reaches the budget.
    """

    def __init__(self, budget: Mapping[str, float], seed: int = 0, image_size: Sequence[int] = (256, 256)) -> None:
        self.budget = _budget('RandomPlan', budget, image_size)
        self.seed = _seed('RandomPlan', seed)

    def _choose(self, chains: Mapping[str, Chain], model: nn.Module | None, parts: Mapping[str, Any]) -> Choice:
        if model is None:
            raise ValueError('RandomPlan: it measures the model, so it needs one; use it as the plan of '
                             'replace_blocks_()')
        places = [(name, index) for name, chain in chains.items() for index in chain.replaceable()]
        choice: Choice = {name: [] for name in chains}
        if not places:
            return choice
        saving = {place: value for place, value in zip(places, _savings(self, chains, model, parts), strict=True)
                  if value > 0}
        drawn = random.Random(self.seed).sample(list(saving), len(saving))
        for name, index in drawn:
            if self.budget.left(model, choice, parts) <= self.budget.part:
                break
            add_(choice, chains, name, index)
        for name, index in drawn:
            less = choice | {name: [other for other in choice[name] if other != index]}
            if self.budget.left(model, less, parts) <= self.budget.part:
                choice = less
        return choice

    def _settings(self) -> str:
        return f'{self.budget}, seed={self.seed}'


def _savings(plan: LearnedPlan | RandomPlan, chains: Mapping[str, Chain], model: nn.Module,
             parts: Mapping[str, Any]) -> list[float]:
    try:
        return plan.budget.savings(chains, model, parts)
    except ValueError as error:
        raise ValueError(f'{plan}: {error}') from error


def _budget(plan: str, budget: Mapping[str, float], image_size: Sequence[int]) -> PlanBudget:
    try:
        return PlanBudget(budget, image_size)
    except ValueError as error:
        raise ValueError(f'{plan}: {error}') from None


def _seed(plan: str, seed: Any) -> int:
    if not is_whole(seed, 0):
        raise ValueError(f'{plan}: seed must be an integer of at least 0, got {seed!r}')
    return seed
