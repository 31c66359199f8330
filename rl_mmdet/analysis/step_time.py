"""How long a training step takes, for two models measured against each other."""
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepTimes:
    """Seconds per training step, measured in alternating blocks in one process.

    Args:
        seconds: median seconds per step, by name.
        ratios: for each round, the second's time over the first's.
    """
    seconds: dict[str, float]
    ratios: list[float]

    @property
    def ratio(self) -> float:
        """Median over rounds of the second's time over the first's, no unit."""
        return statistics.median(self.ratios)


def alternate_steps(steps: Mapping[str, Callable[[], object]], rounds: int = 7, per_round: int = 3) -> StepTimes:
    """Time two training steps as A B A B ..., so that a machine whose speed drifts does not favour one.

    Args:
        steps: two callables by name, the reference first; each makes one training step.
        rounds: pairs of blocks, after one that isn't counted.
        per_round: steps per block.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            seconds = _time(step, per_round)
            if index:
                taken[name].append(seconds)
    first, second = taken.values()
    return StepTimes(seconds={name: statistics.median(times) for name, times in taken.items()},
                     ratios=[b / a for a, b in zip(first, second, strict=True)])


def _time(step: Callable[[], object], count: int) -> float:
    _synchronise()
    start = time.perf_counter()
    for _ in range(count):
        step()
    _synchronise()
    return (time.perf_counter() - start) / count


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
