"""What a model costs, in counts that are the same on every machine."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..replacement import ComputingLayer, computing_layers
from ..replacement.rebuild import rebuilt_input


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of distinct storages that ``forward`` keeps for backward, the model's own state excluded.

    Args:
        model: its parameters and buffers are there anyway and don't count.
        forward: runs the model once with gradients on.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def count_input(layer: ComputingLayer, inputs: tuple) -> None:
        if rebuilt_input(inputs[0]) is None:
            pack(inputs[0])

    hooks = [layer.register_forward_pre_hook(count_input) for layer in computing_layers(model).values()
             if layer.checkpointed or layer.followed]  # these keep their input, but not through autograd
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # kept until all is counted: a freed storage's address may come back
    for hook in hooks:
        hook.remove()
    del outputs
    return sum(kept.values())
