"""Transfers: which tensors of a pretrained backbone are updated; the others stay shared with the base model."""
import random
from collections.abc import Iterable, Sequence

from mmengine.registry import Registry
from torch import nn

from ..replacement.checks import check_number
from .search_settings import SearchSettings, check_seed

TRANSFERS = Registry('transfer', scope='rl_mmdet')


class Transfer:
    """What all transfers share.

    Attributes:
        searches: the choice is made while the model trains, see :mod:`~rl_mmdet.search.tensor_search`.
    """
    searches = False

    def prepare_(self, model: nn.Module) -> None:
        """Let only the chosen tensors of ``model`` learn, in place.

        Args:
            model: the backbone; what is frozen there already stays so and can't be chosen.

        Raises:
            ValueError: the transfer doesn't fit the model.
        """
        freeze_others_(model, self._choose(model))

    def _choose(self, model: nn.Module) -> list[str]:
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

    def _choose(self, model: nn.Module) -> list[str]:
        learn = dict(learnable(model))
        for name in self.names:
            if name not in learn:
                raise ValueError(f'Tensors: {type(model).__name__} has no learnable tensor {name!r}; its tensors are '
                                 f'called like {", ".join(list(learn)[:3])}')
        return self.names

    def __repr__(self) -> str:
        return f'Tensors({len(self.names)} names)'


class _Budgeted(Transfer):
    """Args:
        budget: the most that may be updated, as a part of the backbone's parameters; above 0 and below 1.
    """

    def __init__(self, budget: float) -> None:
        self.budget = check_number(f'{type(self).__name__}: budget', budget, above=0, below=1,
                                   hint='a share of the backbone\'s parameters')

    def check(self, model: nn.Module) -> None:
        """Raise a ValueError if no tensor or every tensor is within the budget."""
        sizes, limit = [p.numel() for _, p in learnable(model)], self.limit(model)
        if not sizes:
            raise ValueError(f'{self}: {type(model).__name__} has no learnable tensor to choose; is all of it frozen?')
        if min(sizes) > limit:
            raise ValueError(f'{self}: the budget of {limit:,.0f} parameters can\'t be reached: the smallest tensor '
                             f'has {min(sizes):,}')
        if sum(sizes) <= limit:
            raise ValueError(f'{self}: all {sum(sizes):,} learnable parameters are within the budget of {limit:,.0f}; '
                             'leave `transfer` out')

    def limit(self, model: nn.Module) -> float:
        """Number of parameters that may be updated."""
        return self.budget * sum(p.numel() for p in model.parameters())

    def fill(self, model: nn.Module, order: Iterable[str]) -> list[str]:
        """As many tensors as fit into the budget, the first ones first."""
        sizes, left, chosen = {name: p.numel() for name, p in learnable(model)}, self.limit(model), []
        for name in order:
            if sizes[name] <= left:
                chosen.append(name)
                left -= sizes[name]
        return chosen

    def __repr__(self) -> str:
        return f'{type(self).__name__}(budget={self.budget})'


@TRANSFERS.register_module()
class RandomTensors(_Budgeted):
    """Tensors drawn at random, as many as fit into the budget: what :class:`SWR` has to beat.

    Args:
        budget: the most that may be updated, as a part of the backbone's parameters; above 0 and below 1.
        seed: of the draw.

    Raises:
        ValueError: a value out of range; when applied: no tensor or every tensor is within the budget.
    """

    def __init__(self, budget: float, seed: int = 0) -> None:
        super().__init__(budget)
        self.seed = check_seed(seed)

    def _choose(self, model: nn.Module) -> list[str]:
        self.check(model)
        names = [name for name, _ in learnable(model)]
        return self.fill(model, random.Random(self.seed).sample(names, len(names)))


class _Searching(_Budgeted):
    searches = True

    def prepare_(self, model: nn.Module) -> None:
        self.check(model)


@TRANSFERS.register_module()
class GradientNorm(_Searching):
    r"""The tensors with the largest gradients, greedily: those of largest :math:`\sum_j ‖∂L_j/∂W_l‖^2` that fit.

    Args:
        budget: the most that may be updated, as a part of the backbone's parameters; above 0 and below 1.
        iters: the first iterations :math:`j` of the training, in which the gradients are looked at, and the head alone
            learns.

    Raises:
        ValueError: a value out of range; when applied: no tensor or every tensor is within the budget.
    """

    def __init__(self, budget: float, iters: int = 50) -> None:
        super().__init__(budget)
        check_number('GradientNorm: iters', iters, whole=True, least=1)
        self.settings = SearchSettings(iters=iters)


@TRANSFERS.register_module()
class SWR(_Searching):
    r"""A policy network learns which tensors are updated, under a budget, in the first part of a training.

    .. math:: W_l' = W_l + g_l Δ_l, \qquad \sum_l g_l\, \mathrm{size}(W_l) \le \mathrm{budget} \cdot \mathrm{size}

    with pretrained tensors W, which stay, updates Δ, which the optimizer learns in the steps in which their gate
    :math:`g_l ∈ \{0, 1\}` is open, and gates that :class:`~rl_mmdet.search.policy.Policy` draws anew in every step; it
    learns from :math:`∂L/∂g_l = ⟨∂L/∂W_l', Δ_l⟩`. From the middle of the search on the gates are settled one by one,
    the most certain first. At its end the chosen tensors have their updates and train on; all others are as they were
    in the pretrained model, without gradient, optimizer state and DDP traffic.

    Args:
        budget: the most that may be updated, as a part of the backbone's parameters; above 0 and below 1.
        epochs, iters, temperature, lr, seed: see :class:`~rl_mmdet.search.search_settings.SearchSettings`.

    Raises:
        ValueError: a value out of range; when applied: no tensor or every tensor is within the budget.

    Source: "Scalable Weight Reparametrization for Efficient Transfer Learning", arXiv 2302.13435.
    """

    def __init__(self, budget: float, epochs: int | None = None, iters: int | None = None,
                 temperature: Sequence[float] = (1., 0.2), lr: float = 0.03, seed: int = 0) -> None:
        super().__init__(budget)
        try:
            self.settings = SearchSettings(epochs, iters, temperature, lr, seed)
        except ValueError as error:
            raise ValueError(f'SWR: {error}') from None


def learnable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that learn, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def freeze_others_(model: nn.Module, names: Iterable[str]) -> None:
    """Let no other parameters learn than these."""
    names = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in names)
