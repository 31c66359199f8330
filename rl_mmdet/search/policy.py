"""The policy: which units of a model are chosen, learned by gradient under a budget."""
import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

EPS = 1e-6
GRID = 20_000
SETTLE_FROM = 0.5
"""Part of the search after which gates are settled."""


@dataclass(frozen=True)
class Unit:
    """What a policy can choose: a block that may be replaced, or a tensor that may be updated.

    Args:
        name: in the model.
        stage: name of its stage.
        depth: where it stands in the model, from 0, the input, to 1.
        kind: what it is, such as a class's or a parameter's name.
        size: number of parameters.
        weight: what choosing it adds to the budgeted quantity; negative if it saves.
    """
    name: str
    stage: str
    depth: float
    kind: str
    size: int
    weight: float


def descriptors(units: Sequence[Unit]) -> Tensor:
    """(units, features) what the policy network sees, each feature of mean 0 and variance 1, constant ones left out.

    These are depth, two waves of it for what changes along the model, the logarithm of the size, the weight, and
    one-hot stage and kind.
    """
    stages, kinds = (sorted({getattr(unit, key) for unit in units}) for key in ('stage', 'kind'))
    rows = [[unit.depth, *(wave(math.pi * n * unit.depth) for n in (1, 2) for wave in (math.sin, math.cos)),
             math.log(unit.size + 1), unit.weight, *(float(unit.stage == stage) for stage in stages),
             *(float(unit.kind == kind) for kind in kinds)] for unit in units]
    table = torch.tensor(rows)
    spread = table.std(0, correction=0)
    varies = spread > EPS * table.abs().amax(0)
    if not varies.any():
        return torch.zeros(len(units), 1)
    return (table[:, varies] - table[:, varies].mean(0)) / spread[varies]


class PolicyNetwork(nn.Module):
    """From descriptors to scores: two layers and, for what descriptors can't tell apart, a bias per unit.

    All units start with the score 0.

    Args:
        units: how many.
        features: how many descriptors each has.
        hidden: width.
    """

    def __init__(self, units: int, features: int, hidden: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.out = nn.Linear(hidden, 1, bias=False)
        self.own = nn.Parameter(torch.zeros(units))
        nn.init.zeros_(self.out.weight)

    def forward(self, table: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(table)))[:, 0] + self.own


def most_probable(odds: Tensor, weights: Tensor, limit: float, at_least: bool, tolerance: float) -> list[int]:
    r"""The subset S of most log-odds :math:`\sum_S o` whose weights keep a limit and come near it.

    By dynamic programming, as knapsacks are packed.

    Args:
        odds: (N,) log-odds o of each unit to be in it.
        weights: (N,) above or at 0. They are rounded to the points of a grid, to the side on which the limit is kept.
        limit: what the weights in S sum up to, at least or at most.
        at_least: which of the two.
        tolerance: how far from the limit their sum may be; it is doubled until there is such a subset.

    Returns:
        Indices of S. If no subset keeps the limit, all of them if they should sum up to at least so much, else none.
    """
    unit = weights.sum().item() / GRID or 1.
    steps = ((weights / unit).floor() if at_least else (weights / unit).ceil()).long().tolist()
    value = torch.full((GRID + len(steps) + 1,), -math.inf, dtype=torch.float64)
    value[0] = 0.
    taken = []
    for odd, step in zip(odds.tolist(), steps, strict=True):
        with_it = torch.full_like(value, -math.inf)
        with_it[step:] = value[:len(value) - step] + odd
        taken.append(with_it > value)
        value = torch.maximum(value, with_it)
    over = torch.arange(len(value)) * unit - limit
    distance = over if at_least else -over
    keeps = (distance >= 0) & value.isfinite()
    if not keeps.any():
        return list(range(len(steps))) if at_least else []
    while not (keeps & (distance <= tolerance)).any():
        tolerance *= 2
    place = int(torch.where(keeps & (distance <= tolerance), value, -math.inf).argmax())
    chosen = []
    for index in reversed(range(len(steps))):
        if taken[index][place]:
            chosen.append(index)
            place -= steps[index]
    return chosen


class Policy:
    r"""Chooses units by gates :math:`g ∈ \{0, 1\}^N` that a network learns to open, so that a budget is kept.

    .. math:: g_l = [u_l > 0], \quad u_l = \frac{z_l - λ w_l}{τ} + \log ξ_l - \log(1 - ξ_l), \quad ξ_l ∼ U(0, 1),
              \qquad \frac{∂g_l}{∂u_l} := σ(u_l)\,σ(-u_l)

    with the network's scores z, the units' weights w (divided by their mean size), and the multiplier λ of the budget
    t. The gates are straight-through Gumbel-sigmoids; a gate is open with the probability
    :math:`p_l = σ((z_l - λ w_l)/τ)`, and since the temperature τ falls geometrically, it becomes certain. The
    multiplier adapts before each step: it is the number for which the budget is kept on average,

    .. math:: \sum_l p_l(λ)\, w_l = t,

    so there is no penalty weight to tune, and learning moves z along the budget only:

    .. math:: \frac{∂L}{∂z_k} = v_k - s_k w_k \frac{\sum_l v_l w_l}{\sum_l s_l w_l^2}, \qquad
              v_l = \frac{∂L}{∂g_l} \frac{∂g_l}{∂z_l}, \quad s_l = p_l (1 - p_l)/τ

    The task's gradient :math:`∂L/∂g` is divided by its running root mean square.

    Args:
        units: what can be chosen, with weights of one sign.
        target: t, the most that the chosen units may weigh together.
        tolerance: how much less they should weigh at most, where units are small enough.
        steps: how many times :meth:`learn` is going to be called; the temperature is for that.
        temperature: τ at the first and at the last step.
        lr: of Adam, for the network's biases of units; its layers, which move all units at once, learn with a tenth.
        seed: of the network and of the gates; equal seeds give equal gates in all processes.

    Raises:
        ValueError: no unit, no step, or a target that every choice or no choice keeps to.

    Sources: "Scalable Weight Reparametrization for Efficient Transfer Learning", arXiv 2302.13435 (policy network,
    gates, budget); Gumbel-sigmoid: arXiv 1611.00712, 1611.01144. The multiplier, which solves the budget instead of
    being a penalty's weight, is ours.
    """
    MEMORY = 0.95

    def __init__(self, units: Sequence[Unit], target: float, steps: int, tolerance: float = 0.01,
                 temperature: tuple[float, float] = (1., 0.2), lr: float = 0.03, seed: int = 0) -> None:
        self.units = list(units)
        self.target = target
        self.tolerance = tolerance
        self.steps = steps
        self._check()
        weights = torch.tensor([unit.weight for unit in units], dtype=torch.float64)
        self.scale = weights.abs().mean().item()
        self.weights = weights / self.scale
        self.saves = bool(weights.sum() < 0)
        self.temperatures = temperature
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.table = descriptors(units)
            self.network = PolicyNetwork(len(units), self.table.shape[1])
        own, *shared = self.network.parameters()
        self.optimizer = torch.optim.Adam([dict(params=own), dict(params=shared, lr=lr / 10)], lr)
        self.step = 0
        self.mean_square = 0.
        self.settled: list[bool | None] = [None] * len(self.units)
        """The gates that don't change any more; None for the others."""
        self.given = 0
        """How many of them were settled before the search."""
        self.scores = self._scores()
        self.soft: Tensor | None = None
        """σ(u) of the last sample."""

    def _check(self) -> None:
        if not self.units:
            raise ValueError('there is nothing to choose from')
        if self.steps < 1:
            raise ValueError(f'a policy needs at least one step to learn, got {self.steps}')
        weights = [unit.weight for unit in self.units]
        lowest, highest = sum(w for w in weights if w < 0), sum(w for w in weights if w > 0)
        if lowest > self.target:
            raise ValueError(f'no choice keeps to the budget: the lowest is {lowest:.4g}, the target {self.target:.4g}')
        if highest <= self.target:
            raise ValueError(f'every choice keeps to the budget: the highest is {highest:.4g}, the target '
                             f'{self.target:.4g}')

    @property
    def temperature(self) -> float:
        """τ of the step to come."""
        first, last = self.temperatures
        return first * (last / first) ** min(1., self.step / max(1, self.steps - 1))

    def probabilities(self) -> Tensor:
        """(N,) with which each gate is open."""
        return self._with_settled(torch.sigmoid(self._logits()))

    def sample(self) -> list[bool]:
        """Gates for one step."""
        noise = torch.rand(len(self.units), generator=self.generator, dtype=torch.float64).clamp(EPS, 1 - EPS).logit()
        self.soft = torch.sigmoid(self._logits() + noise)
        return self._with_settled((self.soft > 0.5).double()).bool().tolist()

    def learn(self, gradient: Tensor, share: Callable[[Tensor], None] | None = None) -> None:
        """One step down the gradient of the task's loss with respect to the gates that were sampled last.

        Args:
            gradient: (N,); the mean over processes, if there are several. Numbers that aren't finite count as 0.
            share: makes a tensor the same in all processes, in place.
        """
        free = self._free()
        gradient = torch.nan_to_num(gradient.double().cpu(), 0., 0., 0.) * free
        square = (gradient.square().sum() / max(1, free.sum().item())).item()
        self.mean_square = square if self.step == 0 else self.MEMORY * self.mean_square + (1 - self.MEMORY) * square
        spread = torch.sigmoid(self._logits())
        spread = spread * (1 - spread) / self.temperature * free
        task = gradient / (math.sqrt(self.mean_square) + 1e-12) * self.soft * (1 - self.soft) / self.temperature
        along = (task @ self.weights) / (spread @ self.weights.square()).clamp(min=1e-12)
        self.optimizer.zero_grad()
        self.network(self.table).backward((task - spread * self.weights * along).float())
        self.optimizer.step()
        self.step += 1
        self.scores = self._scores()
        if share is not None:
            share(self.scores)

    def settle(self, index: int, gate: bool) -> None:
        """From now on this gate is open, or closed."""
        self.settled[index] = gate
        self.given += self.step == 0

    def settle_due(self, best: Callable[[], list[bool]]) -> None:
        """Settle as many gates as are due, the most certain first, as they are in the choice that is the best by then.

        From the middle of the search on gates are settled at equal distances, the last one in its last step.
        """
        progress = max(0., (self.step / self.steps - SETTLE_FROM) / (1 - SETTLE_FROM))
        due = self.given + math.floor((len(self.units) - self.given) * progress)
        while self.count_settled() < due:
            index = self.most_certain()
            self.settle(index, best()[index])

    def count_settled(self) -> int:
        return sum(gate is not None for gate in self.settled)

    def most_certain(self) -> int | None:
        """The gate that is the most certain of those that aren't settled; None if all are."""
        certainty = (self.probabilities() - 0.5).abs()
        free = [index for index, gate in enumerate(self.settled) if gate is None]
        return max(free, key=lambda index: certainty[index].item(), default=None)

    def best(self, fits: Callable[[list[bool]], bool] = lambda gates: True) -> list[bool]:
        """The most probable of the choices that keep the budget and use it up to within the tolerance.

        Where there is none, the tolerance is doubled until there is. Settled gates stay.

        Args:
            fits: whether these units can be chosen together; settled ones must fit.
        """
        gates = [bool(gate) for gate in self.settled]
        free = [index for index, gate in enumerate(self.settled) if gate is None]
        if not free:
            return gates
        odds, saves = self._logits(), self.saves
        room = self.target / self.scale - (torch.tensor(gates).double() @ self.weights).item()
        limit, tolerance = -room if saves else room, self.tolerance / self.scale
        for index in most_probable(odds[free], self.weights[free].abs(), limit, saves, tolerance):
            gates[free[index]] = True
        return gates if fits(gates) else self._one_by_one(odds.argsort(descending=True).tolist(), fits)

    def _one_by_one(self, order: list[int], fits: Callable[[list[bool]], bool]) -> list[bool]:
        """A choice that keeps the budget, as far as units fit together, the most probable ones first."""
        gates = [bool(gate) for gate in self.settled]
        for index in order:
            tried = [gate or number == index for number, gate in enumerate(gates)]
            wanted = self.weight(gates) > self.target if self.saves else self.weight(tried) <= self.target
            if self.settled[index] is None and wanted and fits(tried):
                gates = tried
        return gates

    def weight(self, gates: Sequence[bool]) -> float:
        """What the chosen units weigh together."""
        return sum(unit.weight for unit, gate in zip(self.units, gates, strict=True) if gate)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed search needs."""
        return dict(network=self.network.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step,
                    scores=self.scores, mean_square=self.mean_square, generator=self.generator.get_state(),
                    settled=list(self.settled), given=self.given, steps=self.steps,
                    units=[unit.name for unit in self.units])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            ValueError: it is of other units, or was for another number of steps.
        """
        if state['units'] != [unit.name for unit in self.units]:
            raise ValueError('the policy was learned for other units')
        if state['steps'] != self.steps:
            raise ValueError(f'the search was to take {state["steps"]} steps and would now take {self.steps}')
        self.network.load_state_dict(state['network'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.generator.set_state(state['generator'])
        for name in ('step', 'scores', 'mean_square', 'settled', 'given'):
            setattr(self, name, copy(state[name]))

    @torch.no_grad()
    def _scores(self) -> Tensor:
        return self.network(self.table).double()

    def _free(self) -> Tensor:
        return torch.tensor([gate is None for gate in self.settled], dtype=torch.float64)

    def _with_settled(self, values: Tensor) -> Tensor:
        gates = torch.tensor([float(bool(gate)) for gate in self.settled], dtype=torch.float64)
        return torch.where(self._free().bool(), values, gates)

    def _logits(self) -> Tensor:
        """(z - λw)/τ, with the λ for which the budget is kept on average: the expected weight falls with it."""
        def logits(multiplier: float) -> Tensor:
            return (self.scores - multiplier * self.weights) / self.temperature

        def over(multiplier: float) -> float:
            open_gates = self._with_settled(torch.sigmoid(logits(multiplier)))
            return (open_gates @ self.weights).item() - self.target / self.scale

        low, high = -1e3, 1e3
        if over(low) <= 0:
            return logits(low)
        return logits(high if over(high) >= 0 else brentq(over, low, high))
