"""The output of a cheap layer isn't kept for the next block's backward; it is made again there.

A layer marks its output with the way to make it again (:func:`can_be_made_again`). The block after it, prepared once by
:func:`drop_made_inputs_`, looks for that mark on its input: what autograd would keep of just this tensor becomes a note
how to make it. All else is kept as ever, and so is everything where the mark got lost on the way.
"""
import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_compat import activation_checkpoint, autocast_dtype, is_compiling, keep_instead

MARK = '_made_again_by'


def can_be_made_again(output: Tensor, make: Callable[[], Tensor], inputs: Tensor) -> None:
    """Mark ``output``.

    Args:
        output: of a layer.
        make: computes it again.
        inputs: from which it does so; must not change in place before backward.
    """
    setattr(output, MARK, _Maker(make, inputs, output))


def drop_made_inputs_(block: nn.Module) -> None:
    """From now on ``block`` doesn't keep an input for backward that can be made again."""
    hooks = _Hooks()
    block.register_forward_pre_hook(hooks.before)
    block.register_forward_hook(hooks.after, always_call=True)


def keep_made_inputs_(block: nn.Module) -> None:
    """Undo :func:`drop_made_inputs_`; nothing happens to other blocks."""
    for hooks in (block._forward_pre_hooks, block._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, '__self__', None), _Hooks)]:
            del hooks[key]
            block._forward_hooks_always_called.pop(key, None)


class _Maker:
    """Makes a tensor once more, when it is first asked for, and hands out the same one to all who ask in time."""

    def __init__(self, make: Callable[[], Tensor], inputs: Tensor, output: Tensor) -> None:
        self.make = make
        self.inputs, self.version = inputs, inputs._version
        self.stride = output.stride()
        device = output.device.type
        dtype = autocast_dtype(device)
        self.autocast = dict(device_type=device, enabled=dtype is not None, dtype=dtype)
        self.made: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.made is None:
            if self.inputs._version != self.version:
                raise RuntimeError('the input of a computing layer was modified by an inplace operation between '
                                   'forward and backward, so its output can\'t be made again; set recompute=False')
            with torch.no_grad(), torch.autocast(**self.autocast):
                made = self.make()
            self.made = made if made.stride() == self.stride else torch.empty_strided(
                made.shape, self.stride, dtype=made.dtype, device=made.device).copy_(made)
        return self.made


class _Hooks:
    """Forward hooks of a block; they keep what they have opened only while the block runs."""

    def __init__(self) -> None:
        self.opened: list[ExitStack] = []

    def before(self, block: nn.Module, inputs: tuple) -> None:
        if is_compiling():
            return  # its partitioner decides what is kept
        self.opened.append(ExitStack())
        maker = getattr(inputs[0], MARK, None) if inputs else None
        if maker is not None and torch.is_grad_enabled():
            self.opened[-1].enter_context(_instead_of(inputs[0], maker))

    def after(self, *_: Any) -> None:
        if self.opened:
            self.opened.pop().close()


def _instead_of(tensor: Tensor, maker: _Maker) -> Any:
    """The context in which autograd keeps ``maker`` in the place of ``tensor``."""
    if activation_checkpoint() is not None:
        return nullcontext()  # it keeps nothing anyway, and a maker would keep its own inputs
    alive, version = weakref.ref(tensor), tensor._version

    def is_made(saved: Tensor) -> bool:
        kept = alive()  # it is while the block runs, so the same memory means the same tensor
        return kept is not None and saved.shape == kept.shape and saved.is_set_to(kept) and saved._version == version

    return keep_instead(maker, is_made)
