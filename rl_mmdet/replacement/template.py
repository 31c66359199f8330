"""Templates: what operators run, modules that have given up the parameters which are made for them."""
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .block_structure import all_parameters, slot_of

INIT_NOTES = '_params_init_info'
"""Attribute that MMEngine gives to all modules of a model while it initialises them."""


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
        for method in ('reset_parameters', 'init_weights', '_load_from_state_dict'):
            vars(module).pop(method, None)


def loads_its_own_way(module: nn.Module) -> bool:
    """Whether the module's class has a loader that isn't torch's, as convolutions with weight standardisation have."""
    return not type(module)._load_from_state_dict.__module__.startswith('torch.')


def can_init_weights(template: nn.Module) -> bool:
    """Whether MMEngine would let the template initialise itself, and it has something left to initialise."""
    return callable(getattr(type(template), 'init_weights', None)) and _has_parameters(template)


def init_weights_(template: nn.Module, layer: nn.Module) -> None:
    """Let a template initialise what is left of it, as a part of the model in which ``layer`` stands for it."""
    notes = vars(layer).get(INIT_NOTES)
    if notes is not None:
        setattr(template, INIT_NOTES, notes)
    template.init_weights()
    if notes is not None:
        delattr(template, INIT_NOTES)


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
