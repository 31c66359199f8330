"""What a model costs, in counts that are the same on every machine."""
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..replacement import computing_layers
from ..replacement.rebuild import rebuilt_input


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def saved_bytes(model: nn.Module, forward: Callable[[], object], checkpointed: Iterable[nn.Module] = ()) -> int:
    """Bytes of distinct storages that ``forward`` keeps for backward, the model's own state excluded.

    Args:
        model: its parameters and buffers are there anyway and don't count.
        forward: runs the model once with gradients on.
        checkpointed: its modules that :func:`torch.utils.checkpoint.checkpoint` runs, computing layers apart, which
            are known: they keep their input, but not through autograd.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def count_input(module: nn.Module, inputs: tuple) -> None:
        if rebuilt_input(inputs[0]) is None:
            pack(inputs[0])

    layers = [layer for layer in computing_layers(model).values() if layer.checkpointed or layer.followed]
    hooks = [module.register_forward_pre_hook(count_input) for module in [*layers, *checkpointed]]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # kept until all is counted: a freed storage's address may come back
    for hook in hooks:
        hook.remove()
    del outputs
    return sum(kept.values())


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
