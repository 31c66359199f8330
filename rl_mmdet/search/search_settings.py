"""How long a search is, and how its policy learns."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..replacement.checks import check_number
from .policy import Policy, Unit


@dataclass
class SearchSettings:
    """What all searches have in common.

    Args:
        epochs, iters: length of the search; give one, or none for the first half of the training.
        temperature: of the policy, at the first and at the last step.
        lr: of the policy.
        seed: of the policy.

    Raises:
        ValueError: a value out of range, or both ``epochs`` and ``iters``.
    """
    epochs: int | None = None
    iters: int | None = None
    temperature: Sequence[float] = (1., 0.2)
    lr: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None and self.iters is not None:
            raise ValueError(f'epochs={self.epochs!r} and iters={self.iters!r} both say how long the search is; leave '
                             'one out')
        for name, value in dict(epochs=self.epochs, iters=self.iters).items():
            if value is not None:
                check_number(name, value, whole=True, least=1)
        if not is_pair(self.temperature):
            raise ValueError(f'temperature must be two numbers above 0, got {self.temperature!r}')
        for value in self.temperature:
            check_number('temperature', value, above=0)
        check_number('lr', self.lr, above=0)
        self.seed = check_seed(self.seed)

    def steps(self, most: int, per_epoch: int | None) -> int:
        """Number of iterations.

        Args:
            most: iterations of the run.
            per_epoch: iterations of an epoch; None if the run doesn't count epochs.

        Raises:
            ValueError: the search is longer than the run, or counts epochs where the run doesn't.
        """
        if self.epochs is not None and per_epoch is None:
            raise ValueError('the training counts iterations, not epochs; give the search iters=...')
        steps = self.iters or max(1, most // 2) if self.epochs is None else self.epochs * per_epoch
        if steps > most:
            raise ValueError(f'the search of {steps} iterations is longer than the run of {most}; shorten it or train '
                             'longer')
        return steps

    def policy(self, units: Sequence[Unit], target: float, steps: int, budget: float) -> Policy:
        """The policy for a search; it uses the budget up to within 1 % where units are small enough for that."""
        return Policy(units, target, steps, budget / 100, tuple(self.temperature), self.lr, self.seed)

    def __str__(self) -> str:
        """The length as it was given."""
        return ''.join(f', {name}={value}' for name, value in dict(epochs=self.epochs, iters=self.iters).items()
                       if value is not None)


def check_seed(seed: Any) -> int:
    return check_number('seed', seed, whole=True, least=0)


def is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
