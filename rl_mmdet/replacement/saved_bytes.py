"""What a forward run keeps for backward, in bytes."""
from collections.abc import Callable, Iterable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .computing_layer import computing_layers


def saved_bytes(model: nn.Module, forward: Callable[[], object], checkpointed: Iterable[nn.Module] = ()) -> int:
    """Bytes of distinct storages that ``forward`` keeps for backward, the model's own state excluded.

    What it saves for graphs that it drops again, such as those of a detector's proposals, doesn't count.

    Args:
        model: its parameters and buffers are there anyway and don't count.
        forward: runs the model once with gradients on.
        checkpointed: its modules that :func:`torch.utils.checkpoint.checkpoint` runs, computing layers apart, which
            are known: they keep their input, but not through autograd.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    alive: WeakSet[_Saved] = WeakSet()
    inputs_of_layers: list[_Saved] = []

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # with its graph, a result that its own graph keeps would never be freed
        alive.add(saved)
        return saved

    def count_input(module: nn.Module, inputs: tuple) -> None:
        inputs_of_layers.append(pack(inputs[0]))

    layers = [layer for layer in computing_layers(model).values() if layer.checkpointed or layer.output_made_again]
    hooks = [module.register_forward_pre_hook(count_input) for module in [*layers, *checkpointed]]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        outputs = forward()  # kept until all is counted
    for hook in hooks:
        hook.remove()
    kept = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in alive}
    del outputs
    return sum(size for storage, size in kept.items() if storage not in own)


class _Saved:
    """A tensor that lives as long as the graph it was saved for."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
