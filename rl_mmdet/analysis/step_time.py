"""How long a training step takes, for models measured against each other."""
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def seconds_in_turn(steps: Mapping[str, Callable[[], object]], rounds: int = 7, per_round: int = 3,
                    clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Time any number of steps as A B C A B C ...

    Args:
        steps: by name; each makes one training step.
        rounds: how often all have their turn, after one that isn't counted.
        per_round: steps per turn.
        clock: gives seconds; ``time.process_time`` leaves out what else the machine does, but counts every thread.

    Returns:
        Seconds per step in each round, by name.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            seconds = _time(step, per_round, clock)
            if index:
                taken[name].append(seconds)
    return taken


def ratios_to(taken: Mapping[str, Sequence[float]], reference: str) -> dict[str, list[float]]:
    """Each step's seconds over those of ``reference`` in the same round."""
    return {name: [own / base for own, base in zip(times, taken[reference], strict=True)]
            for name, times in taken.items()}


def _time(step: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    _synchronise()
    start = clock()
    for _ in range(count):
        step()
    _synchronise()
    return (clock() - start) / count


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
