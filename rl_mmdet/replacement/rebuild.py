"""Outputs that are not kept for backward but rebuilt there from the layer's input."""
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

_local = threading.local()


class Rebuilt:
    """A layer's output while the block after it runs: what that one would save of it becomes a note how to make it.

    Args:
        output: the output; not kept.
        make: computes it again, given the input.
        inputs: the layer's input; kept, unless it is rebuilt itself.
        parameters: what ``make`` uses besides; must not change before backward.
    """

    def __init__(self, output: Tensor, make: Callable[[Tensor], Tensor], inputs: Tensor,
                 parameters: list[Tensor]) -> None:
        self.storage = output.untyped_storage().data_ptr()
        self.version = output._version
        self.like = (output.shape, output.stride())
        self.make = make
        self.before = rebuilt_input(inputs)
        self.inputs = None if self.before else inputs
        self.versions = [(tensor, tensor._version) for tensor in ([] if self.before else [inputs]) + parameters]
        self.autocast = (inputs.device.type, torch.is_autocast_enabled(inputs.device.type),
                         torch.get_autocast_dtype(inputs.device.type))
        self._made: Callable[[], Tensor | None] = lambda: None

    def holds(self, tensor: Tensor) -> bool:
        return (tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() == self.storage
                and tensor._version == self.version)

    def tensor(self) -> Tensor:
        """The output again.

        Raises:
            RuntimeError: the layer's input or weights were changed in place since.
        """
        made = self._made()
        if made is None:
            if any(tensor._version != version for tensor, version in self.versions):
                raise RuntimeError('the input or the weights of a computing layer were modified by an inplace '
                                   'operation between forward and backward, so its output can\'t be rebuilt')
            inputs = self.before.tensor() if self.before else self.inputs
            device, enabled, dtype = self.autocast
            with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                made = self.make(inputs)
            shape, stride = self.like
            if made.stride() != stride:
                made = torch.empty_strided(shape, stride, dtype=made.dtype, device=made.device).copy_(made)
            self._made = weakref.ref(made)
        return made


class Follower:
    """Hooks of the block after a layer: while it runs, the layer's output isn't saved.

    Args:
        layer: the layer; it says what is rebuilt by ``layer.rebuilt``.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def enter(self, *_: Any) -> None:
        rebuilt, self.layer.rebuilt = self.layer.rebuilt, None
        if rebuilt is None or not torch.is_grad_enabled():
            return
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

        def pack(tensor: Tensor) -> Any:
            if rebuilt.holds(tensor):
                return rebuilt, (tensor.shape, tensor.stride(), tensor.storage_offset()), tensor.dtype
            return None, outer[0](tensor) if outer else tensor, None

        def unpack(packed: Any) -> Tensor:
            owner, saved, dtype = packed
            if owner is None:
                return outer[1](saved) if outer else saved
            made = owner.tensor()
            return (made if made.dtype == dtype else made.view(dtype)).as_strided(*saved)

        stack = ExitStack()
        _open().append((rebuilt, stack, self))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))

    def leave(self, *_: Any) -> None:
        if _open() and _open()[-1][2] is self:
            _open().pop()[1].close()


def follow(layer: nn.Module, follower: nn.Module) -> None:
    """From now on ``follower``, the block after ``layer``, doesn't keep the layer's output for backward."""
    layer.followed = True
    hooks = Follower(layer)
    follower.register_forward_pre_hook(hooks.enter)
    follower.register_forward_hook(hooks.leave, always_call=True)


def follow_in_chain(chain: Any, indices: list[int]) -> None:
    """:func:`follow` for those of a chain's layers whose output is rebuilt and that have a block after them."""
    for index in indices:
        if index + 1 < len(chain) and chain.blocks[index].rebuilds:
            follow(chain.blocks[index], chain.blocks[index + 1])


def stop_following(module: nn.Module) -> None:
    """Take the hooks of :func:`follow` off a module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, '__self__', None), Follower)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def rebuilt_input(tensor: Tensor) -> Rebuilt | None:
    """What rebuilds ``tensor`` in backward, where it is the output of a layer that the running block follows."""
    return next((rebuilt for rebuilt, _, _ in reversed(_open()) if rebuilt.holds(tensor)), None)


def _open() -> list[tuple[Rebuilt, ExitStack, Follower]]:
    """The blocks that are running and the outputs they follow, of this thread."""
    if not hasattr(_local, 'open'):
        _local.open = []
    return _local.open
