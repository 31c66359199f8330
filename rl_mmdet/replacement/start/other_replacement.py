"""Whether a checkpoint was saved from a model with another replacement, and in which blocks the two differ."""
from collections.abc import Iterable

from torch import nn

from ..computing_layer import ComputingLayer, computing_layers
from .checkpoint import LoadReport


def other_replacement(model: nn.Module, report: LoadReport, new: tuple[str, ...] = ()) -> dict[str, str]:
    """How the blocks of a replaced model's checkpoint differ from the model's.

    What stood in the place of a block is read off the checkpoint's keys: a computing layer saves something, but none of
    the block's weights. A block that was left out (``Skip``) leaves no key, so it isn't noticed.

    Args:
        model: with or without computing layers.
        report: what became of the checkpoint's tensors in it.
        new: beginnings of keys that are in the model and in no checkpoint to start from.

    Returns:
        A text for each block that differs, by its name; nothing for a baseline's checkpoint.
    """
    layers = {name: layer for name, layer in computing_layers(model).items() if not layer.provisional}
    held = {name: _saved(name, report.held.get(name, ()), new) for name in layers}
    there = [name for name, layer in layers.items() if held[name] and not held[name] & set(layer.removed.shapes)]
    only_there = _replaced_only_there(model, report)
    differences = {name: f'{name} is replaced there and kept here' for name in only_there}
    if there or only_there:
        kept_there = [name for name in layers if name in report.initialised]
        differences |= {name: f'{name} is kept there and replaced here' for name in kept_there}
    for name in there:
        here = _saved(name, layers[name].state_dict(), new)
        if held[name] != here:
            differences[name] = f'{name} has {_named(held[name], here)} there and {_named(here, held[name])} here'
    differences |= {key: f'{key} has shape {old} there and {own} here' for key, (old, own) in report.mismatched.items()
                    if key.rpartition('.')[0] in there}
    return differences


def _saved(name: str, keys: Iterable[str], new: tuple[str, ...]) -> set[str]:
    """A module's keys, but for those that begin like ``new`` with the module's name, and BatchNorm's counters."""
    return {key for key in keys if not f'{name}.{key}'.startswith(new) and not key.endswith('num_batches_tracked')}


def _replaced_only_there(model: nn.Module, report: LoadReport) -> list[str]:
    """The blocks of the model of which the checkpoint has no weight, but has tensors that the block itself lacks."""
    modules, missing = dict(model.named_modules()), set(report.missing)
    owners = dict.fromkeys(key.rpartition('.')[0] for key in report.left_over)
    weights = {name: [f'{name}.{key}' for key, _ in modules[name].named_parameters()] for name in owners
               if name and name in modules and not isinstance(modules[name], ComputingLayer)}
    return [name for name, keys in weights.items() if keys and missing.issuperset(keys)]


def _named(keys: set[str], others: set[str]) -> str:
    """What tells ``keys`` from ``others``: the layer's own parameters, or where these agree, a few of the keys."""
    learned = sorted(key for key in keys if '.' not in key)
    if learned != sorted(key for key in others if '.' not in key):
        return ' and '.join(learned) or 'nothing'
    return ', '.join(sorted(keys - others)[:3]) or 'nothing'
