"""Templates: what operators run, modules that have given up the parameters which are made for them."""
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.util import register_after_fork

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .block_structure import all_parameters, slot_of

MADE = 'its weights are made by a computing layer: materialize() the model first'
"""What is said about a module of a replaced block, where another library wants its weights."""


class RunLock:
    """A lock that a thread may take again. A copy, and what is left of it in a new process, is a free one."""

    def __init__(self) -> None:
        self._renew()
        register_after_fork(self, RunLock._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return RunLock, ()


def drop_parameters_(template: nn.Module, untouched: Collection[str] = ()) -> None:
    """Set every parameter slot to None, which initialisers, state dicts and ``parameters()`` all skip.

    Args:
        template: a block or what stands for it.
        untouched: names of the parameters that stay.
    """
    for name in [name for name, _ in all_parameters(template) if name not in untouched]:
        module, slot = slot_of(template, name)
        module._parameters[slot] = None
        module.reset_parameters = _nothing_to_do  # torch's own would ask None for its shape
        module.register_parameter = partial(_refuse, module)
        module.extra_repr = partial(_extra_repr, module)
        if loads_its_own_way(module):  # and such a loader would ask None for its statistics
            module._load_from_state_dict = partial(nn.Module._load_from_state_dict, module)
    for module in template.modules():
        if callable(getattr(type(module), 'init_weights', None)) and not _has_parameters(module):
            module.init_weights = _nothing_to_do


def take_parameters_(template: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Undo :func:`drop_parameters_`, with these parameters in the place of those that were dropped."""
    for name, parameter in parameters.items():
        module, slot = slot_of(template, name)
        module._parameters[slot] = parameter
    for module in template.modules():
        for method in ('reset_parameters', 'register_parameter', 'extra_repr', 'init_weights', '_load_from_state_dict'):
            vars(module).pop(method, None)


def loads_its_own_way(module: nn.Module) -> bool:
    """Whether the module's class has a loader that isn't torch's, as convolutions with weight standardisation have."""
    return not type(module)._load_from_state_dict.__module__.startswith('torch.')


@contextmanager
def with_tensors(template: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, these tensors, by name, are what the template's empty slots show; no state dict has them."""
    slots = [(*slot_of(template, name), tensor) for name, tensor in tensors.items()]
    for owner, slot, tensor in slots:
        vars(owner)[slot] = nn.Parameter(tensor, requires_grad=False)
    try:
        yield
    finally:
        for owner, slot, _ in slots:
            vars(owner).pop(slot, None)


def attributes_of(block: nn.Module) -> frozenset[str]:
    """Names of a block's settings and methods, its class's included; not what is None until a stage sets it."""
    names = {name for name, value in vars(block).items() if value is not None}
    names.update(name for cls in type(block).__mro__ for name in vars(cls))
    return frozenset(name for name in names - set(dir(nn.Module())) if not name.startswith('_'))


@contextmanager
def statistics_stay(template: nn.Module) -> Iterator[None]:
    """While a checkpoint runs a block again, BatchNorm's running statistics stay as the first run has left them."""
    norms = [module for module in template.modules() if isinstance(module, _BatchNorm) and module.training
             and module.track_running_stats]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.
    try:
        yield
    finally:
        for norm, momentum, tracked in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(tracked)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _nothing_to_do() -> None:
    """In the place of methods that set parameters, in modules that have none left."""


def _refuse(module: nn.Module, name: str, *_: object) -> None:
    """In the place of ``register_parameter``, by which pruning and the like take a weight out of its slot."""
    raise RuntimeError(f'{name} can\'t be set on {module!r}')


def _extra_repr(module: nn.Module) -> str:
    """What torch's own errors show of the module."""
    return f'{type(module).extra_repr(module)}, {MADE}'
