"""How long a search is."""
from dataclasses import dataclass

from ..replacement.checks import check_number


@dataclass(frozen=True)
class SearchSchedule:
    """How long a search is, and what its policy draws.

    Args:
        epochs, iters: length of the search; give one, or none for the first half of the training.
        seed: of the policy's network and of the gates it draws.

    Raises:
        ValueError: a value out of range, or both ``epochs`` and ``iters``.
    """
    epochs: int | None = None
    iters: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None and self.iters is not None:
            raise ValueError(f'epochs={self.epochs!r} and iters={self.iters!r} both say how long the search is; leave '
                             'one out')
        for name, value in self._length().items():
            check_number(name, value, whole=True, least=1)
        check_number('seed', self.seed, whole=True, least=0, below=2**63)

    def check(self, epochs: int | None, iters: int | None) -> None:
        """Compare it with a training's length.

        Args:
            epochs: of the training; None if it doesn't count them.
            iters: of the training; None if that isn't known yet.

        Raises:
            ValueError: the search is longer than the training, or counts epochs where the training doesn't.
        """
        if self.epochs is not None and epochs is None:
            raise ValueError('the training counts iterations, not epochs; give the search iters=...')
        run = dict(epochs=epochs, iters=iters)
        for name, value in self._length().items():
            if run[name] is not None and value > run[name]:
                raise ValueError(f'the search of {value} {name} is longer than the run of {run[name]}; shorten it or '
                                 'train longer')

    def steps(self, epochs: int | None, iters: int) -> int:
        """Length of the search in iterations; arguments and errors as in :meth:`check`."""
        self.check(epochs, iters)
        return self.iters or max(1, iters // 2) if self.epochs is None else self.epochs * iters // epochs

    def _length(self) -> dict[str, int]:
        """``epochs`` or ``iters``, whichever was given."""
        return {name: value for name, value in dict(epochs=self.epochs, iters=self.iters).items() if value is not None}

    def __str__(self) -> str:
        """The length as it was given, to be appended to other arguments."""
        return ''.join(f', {name}={value}' for name, value in self._length().items())
