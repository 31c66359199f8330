"""What a model costs, in counts that are the same on every machine."""
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
