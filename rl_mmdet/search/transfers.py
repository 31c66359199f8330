"""Transfers: which tensors of a pretrained backbone are updated; the others stay shared with the base model."""
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmengine.registry import Registry
from torch import Tensor, nn

from ..replacement.checks import check_number
from .policy import Policy, check_same_search
from .schedule import SearchSchedule
from .units import Unit

TRANSFERS = Registry('transfer', scope='rl_mmdet')


class Transfer:
    """Says which tensors of a backbone are updated; what is frozen there already stays so.

    Attributes:
        searches: it is learned which, while the model trains (:class:`~rl_mmdet.search.tensor_search.TensorSearch`).
    """
    searches = False

    def prepare_(self, model: nn.Module) -> None:
        """Freeze all other tensors of ``model``, in place; where it is to be learned which, only check that it can be.

        Raises:
            ValueError: the transfer doesn't fit the model.
        """
        raise NotImplementedError


@TRANSFERS.register_module()
class Tensors(Transfer):
    """Update exactly the tensors that are named; with none, the backbone stays as it is and the head alone learns.

    Args:
        names: of parameters, as in the backbone's ``named_parameters()``.

    Raises:
        TypeError: not a list of names.
        ValueError: a name is unknown, or that of a frozen tensor.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise TypeError(f'Tensors: names must be a list of parameter names, got {names!r}')
        self.names = list(names)

    def prepare_(self, model: nn.Module) -> None:
        learn = dict(learnable(model))
        for name in self.names:
            if name not in learn:
                raise ValueError(f'Tensors: {type(model).__name__} has no learnable tensor {name!r}; its tensors are '
                                 f'called like {", ".join(list(learn)[:3])}')
        freeze_others_(model, self.names)

    def __repr__(self) -> str:
        return f'Tensors({len(self.names)} names)'


class _Budgeted(Transfer):
    """Transfers with a budget: the most that may be updated, as a share of the backbone's parameters."""

    def __init__(self, budget: float) -> None:
        self.budget = check_number(f'{type(self).__name__}: budget', budget, above=0, below=1,
                                   hint='a share of the backbone\'s parameters')

    def prepare_(self, model: nn.Module) -> None:
        sizes, room = [p.numel() for _, p in learnable(model)], self.room(model)
        if not sizes:
            raise ValueError(f'{self}: {type(model).__name__} has no learnable tensor to choose; is all of it frozen?')
        if min(sizes) > room:
            raise ValueError(f'{self}: the budget of {room:,.0f} parameters can\'t be reached: the smallest tensor '
                             f'has {min(sizes):,}')
        if sum(sizes) <= room:
            raise ValueError(f'{self}: all {sum(sizes):,} learnable parameters are within the budget of {room:,.0f}; '
                             'leave `transfer` out')

    def room(self, model: nn.Module) -> float:
        """The budget in parameters."""
        return self.budget * sum(p.numel() for p in model.parameters())

    def __repr__(self) -> str:
        return f'{type(self).__name__}(budget={self.budget})'


@TRANSFERS.register_module()
class RandomTensors(_Budgeted):
    """Tensors drawn at random, as many as fit into the budget: what :class:`SWR` has to beat.

    Args:
        budget: the most that may be updated, as a share of the backbone's parameters; above 0 and below 1.
        seed: of the draw.

    Raises:
        ValueError: a value out of range; when applied: no tensor or every tensor is within the budget.
    """

    def __init__(self, budget: float, seed: int = 0) -> None:
        super().__init__(budget)
        self.seed = check_number('RandomTensors: seed', seed, whole=True, least=0)

    def prepare_(self, model: nn.Module) -> None:
        super().prepare_(model)
        units = tensor_units(model)
        order = random.Random(self.seed).sample(range(len(units)), len(units))
        freeze_others_(model, [units[index].name for index in _that_fit(order, units, self.room(model))])


@TRANSFERS.register_module()
class GradientNorm(_Budgeted):
    r"""The tensors with the largest gradients, greedily: those of largest :math:`\sum_j ‖∂L_j/∂W_l‖^2` that fit.

    Args:
        budget: the most that may be updated, as a share of the backbone's parameters; above 0 and below 1.
        iters: the first iterations :math:`j` of the training, in which the gradients are looked at, and the head alone
            learns.

    Raises:
        ValueError: a value out of range; when applied: no tensor or every tensor is within the budget.
    """
    searches = True

    def __init__(self, budget: float, iters: int = 50) -> None:
        super().__init__(budget)
        check_number('GradientNorm: iters', iters, whole=True, least=1)
        self.schedule = SearchSchedule(iters=iters)

    def policy(self, units: Sequence[Unit], room: float, steps: int) -> 'LargestFirst':
        """What chooses the tensors."""
        return LargestFirst(units, room, steps)

    def signal(self, gradient: Tensor, update: Tensor) -> Tensor:
        """What the choice of a tensor is learned from, given its gradient and its update so far."""
        return gradient.square().sum()


@TRANSFERS.register_module()
class SWR(_Budgeted):
    r"""A policy network learns which tensors are updated, under a budget, in the first part of a training.

    .. math:: W_l' = W_l + g_l Δ_l, \qquad \sum_l g_l\, \mathrm{size}(W_l) \le \mathrm{budget} \cdot \mathrm{size}

    with pretrained tensors W, which stay, updates Δ, which the optimizer learns in the steps in which their gate
    :math:`g_l ∈ \{0, 1\}` is open, and gates that :class:`~rl_mmdet.search.policy.Policy` draws anew in every step; it
    learns from :math:`∂L/∂g_l = ⟨∂L/∂W_l', Δ_l⟩`. From the middle of the search on the gates are settled one by one,
    the most certain first. At its end the chosen tensors have their updates and train on; all others are as they were
    in the pretrained model, without gradient, optimizer state and DDP traffic.

    Args:
        budget: the most that may be updated, as a share of the backbone's parameters; above 0 and below 1.
        epochs, iters, temperature, lr, seed: see :class:`~rl_mmdet.search.schedule.SearchSchedule`.

    Raises:
        ValueError: a value out of range; when applied: no tensor or every tensor is within the budget.

    Source: "Scalable Weight Reparametrization for Efficient Transfer Learning", arXiv 2302.13435.
    """
    searches = True

    def __init__(self, budget: float, epochs: int | None = None, iters: int | None = None,
                 temperature: Sequence[float] = (1., 0.2), lr: float = 0.03, seed: int = 0) -> None:
        super().__init__(budget)
        try:
            self.schedule = SearchSchedule(epochs, iters, temperature, lr, seed)
        except ValueError as error:
            raise ValueError(f'SWR: {error}') from None

    def policy(self, units: Sequence[Unit], room: float, steps: int) -> Policy:
        """What chooses the tensors."""
        return self.schedule.policy(units, room, steps, room / 100)

    def signal(self, gradient: Tensor, update: Tensor) -> Tensor:
        """What the choice of a tensor is learned from, given its gradient and its update so far: ∂L/∂g."""
        return (gradient * update).sum()


class LargestFirst:
    """In the place of a policy: opens no gate, adds up what it learns from, and takes the units with the largest sums.

    Arguments and methods are those of :class:`~.policy.Policy`, ``room`` being the limit.
    """

    def __init__(self, units: Sequence[Unit], room: float, steps: int) -> None:
        self.units, self.room, self.steps = units, room, steps
        self.step = 0
        self.sums = torch.zeros(len(units), dtype=torch.float64)
        self.settled = torch.full_like(self.sums, math.nan)

    def sample(self) -> list[bool]:
        return [False] * len(self.units)

    def learn(self, signal: Tensor | None, share: Any = None) -> None:
        self.step += 1
        if signal is not None:
            self.sums += signal.double().cpu()

    def best(self) -> list[bool]:
        fit = set(_that_fit(self.sums.argsort(descending=True).tolist(), self.units, self.room))
        return [index in fit for index in range(len(self.units))]

    def log_values(self) -> Tensor:
        return self.sums

    def state_dict(self) -> dict[str, Any]:
        return dict(step=self.step, steps=self.steps, sums=self.sums, units=[unit.name for unit in self.units])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same_search(state, self.units, self.steps)
        self.step, self.sums = state['step'], state['sums'].clone()


def learnable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that learn, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def tensor_units(model: nn.Module) -> list[Unit]:
    """The tensors that can be updated; each weighs its number of parameters."""
    tensors = learnable(model)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    units = []
    for index, (name, parameter) in enumerate(tensors):
        owner, _, slot = name.rpartition('.')
        units.append(Unit(name, name.split('.')[0], index / max(1, len(tensors) - 1), f'{kinds[owner]}.{slot}',
                          parameter.numel(), parameter.numel()))
    return units


def freeze_others_(model: nn.Module, names: Iterable[str]) -> None:
    """Let no other parameters learn than these."""
    names = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in names)


def _that_fit(order: Iterable[int], units: Sequence[Unit], room: float) -> list[int]:
    """As many of the units as have room, the first ones first."""
    taken = []
    for index in order:
        if units[index].size <= room:
            taken.append(index)
            room -= units[index].size
    return taken
