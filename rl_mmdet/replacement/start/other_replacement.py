"""Whether a checkpoint was saved from a model with another replacement, and in which blocks the two differ."""
from collections.abc import Mapping

from torch import Tensor, nn

from ..computing_layer import ComputingLayer, computing_layers
from .checkpoint import LoadReport


def other_replacement(model: nn.Module, state_dict: Mapping[str, Tensor], report: LoadReport,
                      new: tuple[str, ...] = ()) -> dict[str, str]:
    """How the blocks of a replaced model's checkpoint differ from the model's.

    What stood in the place of a block is read off the checkpoint's keys: a computing layer saves something, but none of
    the block's weights. A block that was left out (``Skip``) leaves no key, so it isn't noticed.

    Args:
        model: with or without computing layers.
        state_dict: the checkpoint's tensors by the model's keys.
        report: what :func:`~rl_mmdet.replacement.start.adapt_state_dict` says about the two.
        new: beginnings of keys that are in the model and in no checkpoint to start from.

    Returns:
        A text for each block that differs, by its name; nothing for a baseline's checkpoint.
    """
    layers = {name: layer for name, layer in computing_layers(model).items() if not layer.provisional}
    held = {name: _saved(name, state_dict, new) for name in layers}
    there = [name for name, layer in layers.items() if held[name] and not held[name] & set(layer.removed.shapes)]
    only_there = _replaced_only_there(model, report)
    differences = {name: f'{name} is replaced there and kept here' for name in only_there}
    if there or only_there:
        differences |= {name: f'{name} is kept there and replaced here' for name in layers if name in report.fits}
    for name in there:
        here = _saved(name, layers[name].state_dict(prefix=f'{name}.'), new)
        if held[name] != here:
            differences[name] = f'{name} has {_named(held[name], here)} there and {_named(here, held[name])} here'
    differences |= {key: f'{key} has shape {old} there and {own} here' for key, (old, own) in report.mismatched.items()
                    if key.rpartition('.')[0] in there}
    return differences


def _saved(name: str, state_dict: Mapping[str, Tensor], new: tuple[str, ...]) -> set[str]:
    """The keys below a module's name, without it; neither those that begin like ``new`` nor BatchNorm's counters."""
    return {key.removeprefix(f'{name}.') for key in state_dict if key.startswith(f'{name}.')
            and not key.startswith(new) and not key.endswith('num_batches_tracked')}


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
