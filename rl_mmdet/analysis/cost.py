"""What a model costs: counts that are the same on every machine, and times of models measured against each other."""
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import nn

from .._torch_compat import allocated_bytes
from ..replacement import computing_layers, set_step_


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def mean_over_steps(model: nn.Module, measure: Callable[[], float]) -> float:
    """The mean of what ``measure`` gives over the steps of a training.

    With ``gradient=dict(every=k)`` replaced blocks learn in one of k steps, so it is measured in a step in which all
    learn and, with the weight k - 1, in one in which none does.
    """
    every = max((layer.gradient.every for layer in computing_layers(model).values()), default=1)
    set_step_(model, 0, staggered=False)
    learning = measure()
    if every == 1:
        return learning
    set_step_(model, 1, staggered=False)
    return (learning + (every - 1) * measure()) / every


def peak_memory(run: Callable[[], object], device: torch.device | str = 'cpu') -> int:
    """Bytes that ``run`` has allocated at its peak, beyond what was there before.

    On a GPU by torch's caching allocator; on a CPU from the record of torch's allocator that
    :func:`torch.profiler.profile` keeps, which sees whatever a dispatch mode sees and what kernels allocate themselves.
    """
    device = torch.device(device)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(accumulate(allocated_bytes(run), initial=0))


def seconds_in_turn(steps: Mapping[Hashable, Callable[[], object]], rounds: int = 7, per_round: int = 3,
                    clock: Callable[[], float] = time.perf_counter) -> dict[Hashable, list[float]]:
    """Time any number of steps as A B C A B C ...

    Args:
        steps: by name; each makes one training step.
        rounds: how often all have their turn, after one that isn't counted.
        per_round: steps per turn.
        clock: gives seconds; ``time.process_time`` leaves out what else the machine does, but counts every thread.

    Returns:
        Seconds per step in each round, by name.
    """
    taken: dict[Hashable, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            _synchronise()
            start = clock()
            for _ in range(per_round):
                step()
            _synchronise()
            taken[name].append((clock() - start) / per_round)
    return {name: seconds[1:] for name, seconds in taken.items()}


def ratios_to(taken: Mapping[Hashable, Sequence[float]], reference: Hashable) -> dict[Hashable, list[float]]:
    """Each step's seconds over those of ``reference`` in the same round."""
    return {name: [own / base for own, base in zip(times, taken[reference], strict=True)]
            for name, times in taken.items()}


def _synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
