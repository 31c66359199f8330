"""What torch before 2.4 lacks or calls otherwise, and what both folding and the method ask of a module."""
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

if hasattr(torch.compiler, 'is_compiling'):
    is_compiling = torch.compiler.is_compiling
else:
    from torch._dynamo.external_utils import is_compiling  # noqa: F401


def is_recorded() -> bool:
    """Whether operations are recorded by a compiler or an exporter, which take each as it is written."""
    return is_compiling() or torch.jit.is_tracing()


def other_ways_forward(cls: type[nn.Module]) -> list[str]:
    """Methods besides ``forward`` by which a backbone runs modules of this class, such as ``rfp_forward``."""
    return [name for name in dir(cls) if name.endswith('_forward') and not name.startswith('_')]


def map_pairs(function: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    """``tree_map`` of two trees of the same structure, which newer torch has itself."""
    leaves, structure = tree_flatten(one)
    return tree_unflatten([function(*pair) for pair in zip(leaves, tree_flatten(other)[0], strict=True)], structure)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type to which autocast casts on such a device; None where it is off."""
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if device_type == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


@contextmanager
def no_grad() -> Iterator[None]:
    """``torch.no_grad()`` within autocast, which in older torch hands weights that it casts there on to what learns."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def allocated_bytes(run: Callable[[], object]) -> list[int]:
    """What ``run`` allocates on the CPU, in order; what it frees is negative."""
    old = not hasattr(torch._C._autograd._KinetoEvent, 'start_ns')
    settings = {} if old else dict(acc_events=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, **settings) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_us() if old else event.start_ns())
    return [event.nbytes() for event in events]


# Hooks for saved tensors. Only the innermost ones are called. Old torch doesn't tell which these are.

_top_hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)


def activation_checkpoint() -> Any:
    """The non-reentrant activation checkpoint in which this runs, None outside of all.

    It compares equal to itself, but not when the same part runs again in backward.
    """
    if _top_hooks is None:
        return _checkpoint_on_the_stack()
    hooks = _top_hooks(False)
    return hooks if hooks and getattr(hooks[0], '__module__', '') == checkpoint.__module__ else None


def keep_instead(make: Callable[[], Tensor], is_made: Callable[[Tensor], bool]) -> saved_tensors_hooks:
    """The context in which autograd keeps ``make`` in the place of tensors for which ``is_made`` is true.

    All others are kept as ever, by hooks around this context where there are any.
    """
    own: list[weakref.ref] = []  # a cycle would keep what is made, and what from, until the garbage collector comes
    outer = _hooks_around(lambda: [hook() for hook in own]) if _top_hooks is None else _top_hooks(False)

    def pack(saved: Tensor) -> Any:
        if is_made(saved):
            return make
        return outer[0](saved) if outer else saved.detach()  # with its graph, it would keep itself in a dropped one

    def unpack(packed: Any) -> Tensor:
        if packed is make:
            return make()
        return outer[1](packed) if outer else packed

    own += weakref.ref(pack), weakref.ref(unpack)
    return saved_tensors_hooks(pack, unpack)


def _checkpoint_on_the_stack() -> Any:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get('__name__') == checkpoint.__module__:
            found = frame.f_locals
            if frame.f_code.co_name == 'checkpoint' and 'gen' in found:  # runs for the first time
                return weakref.ref(found['gen'])
            if frame.f_code.co_name == 'unpack_hook':  # runs again
                return weakref.ref(found['frame']), found['gid']
        frame = frame.f_back
    return None


def _hooks_around(own: Callable[[], Sequence[Callable]]) -> tuple[Callable, Callable]:
    """Stands for the hooks around ``own`` ones: autograd itself saves the tensor, with the own ones put aside."""

    def pack(tensor: Tensor) -> Any:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        try:
            with torch.enable_grad():
                return _Save.apply(torch.empty(0, requires_grad=True), tensor.detach())
        finally:
            torch._C._autograd._push_saved_tensors_default_hooks(*own())

    return pack, lambda kept: kept.grad_fn.saved_tensors[0]


class _Save(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, learns: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return learns.clone()
