"""Transfers: which tensors of a pretrained backbone are updated; the others stay shared with the base model."""
from collections.abc import Iterable, Sequence

from mmengine.registry import Registry
from torch import nn

from ..replacement.checks import check_number
from .schedule import SearchSchedule
from .units import Unit

TRANSFERS = Registry('transfer', scope='rl_mmdet')


@TRANSFERS.register_module()
class Tensors:
    """Update exactly the tensors that are named; with none, the backbone stays as it is and the head alone learns.

    Args:
        names: of parameters, as in the backbone's ``named_parameters()``.

    Raises:
        TypeError: not a list of names.
        ValueError: when applied: a name is unknown, or that of a frozen tensor.
    """
    searches = False

    def __init__(self, names: Sequence[str] = ()) -> None:
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise TypeError(f'Tensors: names must be a list of parameter names, got {names!r}')
        self.names = list(names)

    def prepare_(self, model: nn.Module) -> None:
        """Freeze all other tensors of ``model``, in place."""
        learn = dict(learnable(model))
        for name in self.names:
            if name not in learn:
                raise ValueError(f'Tensors: {type(model).__name__} has no learnable tensor {name!r}; its tensors are '
                                 f'called like {", ".join(list(learn)[:3])}')
        freeze_others_(model, self.names)

    def __repr__(self) -> str:
        return f'Tensors({len(self.names)} names)'


@TRANSFERS.register_module()
class SWR:
    r"""A policy network learns which tensors are updated, under a budget, in the first part of a training.

    .. math:: W_l' = W_l + g_l Δ_l, \qquad \sum_l g_l\, \mathrm{size}(W_l) \le \mathrm{budget} \cdot \mathrm{size}

    with pretrained tensors W, which stay, updates Δ, which the optimizer learns in the steps in which their gate
    :math:`g_l ∈ \{0, 1\}` is open, and gates that :class:`~rl_mmdet.search.policy.Policy` draws anew in every step; it
    learns from :math:`∂L/∂g_l = ⟨∂L/∂W_l', Δ_l⟩`. From the middle of the search on the gates are settled one by one,
    the most certain first. At its end the chosen tensors have their updates and train on; all others are as they were
    in the pretrained model, without gradient, optimizer state and DDP traffic.

    Args:
        budget: the most that may be updated, as a share of the backbone's parameters; above 0 and below 1.
        epochs, iters, seed: see :class:`~rl_mmdet.search.schedule.SearchSchedule`.

    Raises:
        ValueError: a value out of range; when applied: no tensor or every tensor is within the budget.

    Source: "Scalable Weight Reparametrization for Efficient Transfer Learning", arXiv 2302.13435.
    """
    searches = True

    def __init__(self, budget: float, epochs: int | None = None, iters: int | None = None, seed: int = 0) -> None:
        self.budget = check_number('SWR: budget', budget, above=0, below=1,
                                   hint='a share of the backbone\'s parameters')
        try:
            self.schedule = SearchSchedule(epochs, iters, seed)
        except ValueError as error:
            raise ValueError(f'SWR: {error}') from None

    def prepare_(self, model: nn.Module) -> None:
        """Check that ``model`` has what is to be chosen; all of it learns until the choice is made."""
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
        return f'SWR(budget={self.budget})'


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
