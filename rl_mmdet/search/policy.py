"""The policy: gates that say which units of a model are taken, learned by gradient so that a limit is kept."""
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

from .knapsack import pack
from .units import PolicyNetwork, Unit, descriptors

TEMPERATURES = 1., 0.2
"""At the first and at the last step."""
LR = 0.03
"""Of Adam, for the network's biases of units; its layers, which move all units at once, learn with a tenth."""
MEMORY = 0.95
"""How much of the running mean square of the gates' gradients stays in each step."""


class Policy:
    r"""Takes units by gates :math:`g ∈ \{0, 1\}^N` that a network learns to open, so that a limit is kept.

    .. math:: g_l = [u_l > 0], \quad u_l = \frac{z_l - λ w_l}{τ} + \log ξ_l - \log(1 - ξ_l), \quad ξ_l ∼ U(0, 1),
              \qquad \frac{∂g_l}{∂u_l} := σ(u_l)\,σ(-u_l)

    with the network's scores z, the units' weights w (divided by their mean size), and the multiplier λ of the limit t.
    The gates are straight-through Gumbel-sigmoids. A gate is open with the probability
    :math:`p_l = σ((z_l - λ w_l)/τ)`, which becomes certain as the temperature τ falls (geometrically). Before each step
    the multiplier is solved for, so that the limit is kept on average:

    .. math:: \sum_l p_l(λ)\, w_l = t

    There is thus no penalty weight to tune, and learning moves z along the limit only:

    .. math:: \frac{∂L}{∂z_k} = v_k - s_k w_k \frac{\sum_l v_l w_l}{\sum_l s_l w_l^2}, \qquad
              v_l = \frac{∂L}{∂g_l} \frac{∂g_l}{∂z_l}, \quad s_l = p_l (1 - p_l)/τ

    The task's gradient :math:`∂L/∂g` is divided by its running root mean square. From the middle of the search on the
    gates are settled one after the other, the most certain one first and the last one in the last step: a settled gate
    stays open or closed.

    Args:
        units: what can be taken, with weights of one sign.
        limit: t, the most that the units that are taken may weigh together.
        steps: how many times :meth:`learn` is going to be called.
        tolerance: how much less they should weigh at most, where units are small enough.
        seed: of the network and of the gates; equal seeds give equal gates in all processes.
        fits: whether these units can be taken together. What doesn't fit gives way to units that are more probable.

    Attributes:
        step: steps learned so far.
        settled: (N,) 1 for the gates that stay open, 0 for those that stay closed, NaN for the others.

    Sources: "Scalable Weight Reparametrization for Efficient Transfer Learning", arXiv 2302.13435 (policy network,
    gates, limit); Gumbel-sigmoid: arXiv 1611.00712, 1611.01144. Solving for the multiplier, where the paper has a
    penalty, is ours.
    """

    def __init__(self, units: Sequence[Unit], limit: float, steps: int, tolerance: float = 0.01, seed: int = 0,
                 fits: Callable[[list[bool]], bool] = lambda gates: True) -> None:
        self.units = list(units)
        self.limit, self.tolerance, self.fits = limit, tolerance, fits
        self.step, self.steps = 0, steps
        weights = torch.tensor([unit.weight for unit in units], dtype=torch.float64)
        self.scale = weights.abs().mean().item()
        self.weights = weights / self.scale
        self.saves = bool(weights.sum() < 0)
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all devices
            self.table = descriptors(units)
            self.network = PolicyNetwork(len(units), self.table.shape[1])
        own, *shared = self.network.parameters()
        self.optimizer = torch.optim.Adam([dict(params=own), dict(params=shared, lr=LR / 10)], LR)
        self.mean_square = 0.
        self.settled = torch.full_like(weights, math.nan)
        self.scores = self._scores()
        self.soft: Tensor | None = None
        """σ(u) of the last sample."""

    @property
    def temperature(self) -> float:
        """τ of the step to come."""
        first, last = TEMPERATURES
        return first * (last / first) ** min(1., self.step / max(1, self.steps - 1))

    def probabilities(self) -> Tensor:
        """(N,) with which each gate is open."""
        return self._with_settled(torch.sigmoid(self._logits()))

    def sample(self) -> list[bool]:
        """Draw the gates of one step."""
        noise = torch.rand(len(self.units), generator=self.generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6).logit()
        logits = self._logits()
        self.soft = torch.sigmoid(logits + noise)
        drawn = self._with_settled((self.soft > 0.5).double()).bool().tolist()
        return drawn if self.fits(drawn) else self._one_by_one(logits, lambda gates, index: drawn[index])

    def learn(self, gradient: Tensor | None, share: Callable[[Tensor], Any] | None = None) -> None:
        """One step down the gradient of the task's loss with respect to the gates that were sampled last.

        Args:
            gradient: (N,); the mean over processes, if there are several. Numbers that aren't finite count as 0. None:
                there is none in this step, which counts all the same.
            share: makes a tensor the same in all processes, in place.
        """
        if gradient is not None:
            self.optimizer.zero_grad()
            self.network(self.table).backward(self._gradient_of_scores(gradient).float())
            self.optimizer.step()
            self.scores = self._scores()
            if share is not None:
                share(self.scores)
        self.step += 1
        self._settle_due()

    def settle(self, index: int, gate: bool) -> None:
        """From now on this gate is open, or closed."""
        self.settled[index] = gate

    def best(self) -> list[bool]:
        """The gates of the most probable selection that keeps the limit and comes near it, up to the tolerance.

        Where there is none, the tolerance is doubled until there is. Settled gates stay.
        """
        gates, free, logits = self.settled == 1, self.settled.isnan(), self._logits()
        if free.any():
            sign = -1 if self.saves else 1  # what saves must be: then what is *not* taken is packed
            gates = torch.where(free, self.saves, gates)
            room = (self.limit - self.weight(gates)) / self.scale
            packed = pack(sign * logits[free], self.weights[free].abs(), room, self.tolerance / self.scale)
            gates[free.nonzero()[packed, 0]] = not self.saves
        return gates.tolist() if self.fits(gates.tolist()) else self._one_by_one(logits, self._wanted)

    def weight(self, gates: Sequence[bool] | Tensor) -> float:
        """What the units with open gates weigh together."""
        return (torch.as_tensor(gates).double() @ self.weights).item() * self.scale

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed search needs."""
        return dict(network=self.network.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step,
                    scores=self.scores, mean_square=self.mean_square, generator=self.generator.get_state(),
                    settled=self.settled, steps=self.steps, units=[unit.name for unit in self.units])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            ValueError: it is of other units, or was for another number of steps.
        """
        if state['units'] != [unit.name for unit in self.units]:
            raise ValueError('the search was for other blocks or tensors')
        if state['steps'] != self.steps:
            raise ValueError(f'the search was to take {state["steps"]} steps and would now take {self.steps}')
        self.network.load_state_dict(state['network'])
        self.optimizer.load_state_dict(deepcopy(state['optimizer']))
        self.generator.set_state(state['generator'])
        for name in ('step', 'scores', 'mean_square', 'settled'):
            setattr(self, name, deepcopy(state[name]))

    def _gradient_of_scores(self, gradient: Tensor) -> Tensor:
        """∂L/∂z along the limit, from ∂L/∂g; see the class."""
        free = self.settled.isnan()
        gradient = torch.nan_to_num(gradient.double().cpu(), 0., 0., 0.) * free
        square = (gradient.square().sum() / max(1, free.sum().item())).item()
        self.mean_square = square if self.step == 0 else MEMORY * self.mean_square + (1 - MEMORY) * square
        spread = torch.sigmoid(self._logits())
        spread = spread * (1 - spread) / self.temperature * free
        task = gradient / (math.sqrt(self.mean_square) + 1e-12) * self.soft * (1 - self.soft) / self.temperature
        along = (task @ self.weights) / (spread @ self.weights.square()).clamp(min=1e-12)
        return task - spread * self.weights * along

    def _settle_due(self) -> None:
        """Settle as many gates as are due by now, each as it is in the best selection at that moment."""
        due = len(self.units) * (2 * self.step - self.steps) // self.steps
        while (free := self.settled.isnan()).sum() > len(self.units) - due:
            index = int(torch.where(free, (self.probabilities() - 0.5).abs(), -1.).argmax())
            self.settle(index, self.best()[index])

    def _one_by_one(self, logits: Tensor, wanted: Callable[[list[bool], int], bool]) -> list[bool]:
        """Settled gates, and those that are wanted beside the ones before, as far as they fit; likely ones first."""
        gates = (self.settled == 1).tolist()
        for index in logits.argsort(descending=True).tolist():
            tried = [gate or number == index for number, gate in enumerate(gates)]
            if self.settled[index].isnan() and wanted(gates, index) and self.fits(tried):
                gates = tried
        return gates

    def _wanted(self, gates: list[bool], index: int) -> bool:
        """Whether one more gate is needed to keep the limit, or can be opened within it."""
        weight = self.weight(gates)
        return weight > self.limit if self.saves else weight + self.units[index].weight <= self.limit

    @torch.no_grad()
    def _scores(self) -> Tensor:
        """(N,) z."""
        return self.network(self.table).double()

    def _with_settled(self, values: Tensor) -> Tensor:
        """``values`` of the gates that aren't settled, and 1 or 0 for the others."""
        return torch.where(self.settled.isnan(), values, self.settled)

    def _logits(self) -> Tensor:
        """(N,) (z - λw)/τ, with the λ for which the limit is kept on average: the expected weight falls with it."""
        def logits(multiplier: float) -> Tensor:
            return (self.scores - multiplier * self.weights) / self.temperature

        def over(multiplier: float) -> float:
            open_gates = self._with_settled(torch.sigmoid(logits(multiplier)))
            return (open_gates @ self.weights).item() - self.limit / self.scale

        low, high = -1e3, 1e3
        if over(low) <= 0:
            return logits(low)
        return logits(high if over(high) >= 0 else brentq(over, low, high))
