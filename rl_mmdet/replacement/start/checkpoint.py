"""A baseline checkpoint into a replaced model: removed blocks' weights leave it, and computing layers start anew."""
import copy
import logging
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..computing_layer import ComputingLayer, computing_layers
from ..resize import Shape
from ..template import loads_its_own_way

logger = logging.getLogger('rl_mmdet')


@dataclass
class LoadReport:
    """What each tensor of a checkpoint was used for.

    Args:
        loaded: keys that are taken as they are.
        initialised: computing layers that begin at their start, as the removed block's weights are there.
        missing: keys the model needs and the checkpoint lacks.
        left_over: keys of the checkpoint that nothing in the model takes.
        mismatched: by key, the shape in the checkpoint and the shape in the model.
        held: by computing layer, the checkpoint's keys for its place, without the layer's name.
    """
    loaded: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    held: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Four lines: loaded, used for initialisation, missing, left over."""
        left = self.left_over + [f'{key} {old} instead of {new}' for key, (old, new) in self.mismatched.items()]
        return '\n'.join([
            f'loaded: {len(self.loaded)} tensors',
            f'used for initialisation: {len(self.initialised)} removed blocks'
            + (f': {listed(self.initialised)}' if self.initialised else ''),
            f'missing: {listed(self.missing)}',
            f'left over: {listed(left)}'])


def adapt_state_dict(model: nn.Module, state_dict: dict[str, Any], prefix: str = '') -> tuple[dict, LoadReport]:
    """Translate a baseline's state dict for a replaced model.

    The weights of a removed block leave the state dict; in their place come the starting values of its computing
    layer's parameters. A state dict of the replaced model itself passes unchanged.

    Args:
        model: a model with or without computing layers.
        state_dict: tensors by key; not changed.
        prefix: what the model's keys begin with in ``state_dict``.

    Returns:
        The translated state dict, and the report on it (its names come without the prefix).

    Raises:
        ValueError: the model's plan is still to be learned, and the state dict is of a model whose plan is found.
    """
    _check_unfinished(model, state_dict, prefix)
    state_dict = _with_copies(model, state_dict, prefix)
    adapted = dict(state_dict)
    report = LoadReport()
    for name, layer in computing_layers(model).items():
        place, shapes = f'{prefix}{name}.', layer.removed.shapes
        report.held[name] = [key[len(place):] for key in state_dict if key.startswith(place)]
        removed = [key for key in report.held[name] if key in shapes and key not in layer.learned]
        if not removed:
            continue
        report.initialised.append(name)
        adapted.update(_own_buffers(layer, state_dict, place))
        for key in removed:
            given = adapted.pop(place + key)
            if given.shape != shapes[key]:
                report.mismatched[f'{name}.{key}'] = (tuple(given.shape), shapes[key])
        for buffer in layer.removed.unused_buffers:
            adapted.pop(place + buffer, None)
        own = layer.own_parameters()
        adapted.update({place + key: value.to(own[key].dtype) for key, value in layer.start_values().items()})
    _compare(model, adapted, prefix, report)
    return adapted, report


def add_pretrained_hook(model: nn.Module) -> None:
    """From now on loading a baseline's state dict into ``model`` also initialises its computing layers.

    What became of the tensors is in ``model.load_report`` then, a :class:`LoadReport`.
    """
    remove_pretrained_hook(model)
    model._register_load_state_dict_pre_hook(_initialise_on_load, with_module=True)


def remove_pretrained_hook(model: nn.Module) -> None:
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, wrapped in hooks.items() if getattr(wrapped, 'hook', None) is _initialise_on_load]:
        del hooks[key]
    vars(model).pop('load_report', None)


def _initialise_on_load(module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """Load hook: translate the state dict in place before any tensor of ``module`` is read from it.

    It runs for torch's ``load_state_dict`` as for mmengine's, which walks the modules one by one and gives each
    only its own keys; the hook therefore sits on the module that holds all the neighbours.
    """
    adapted, report = adapt_state_dict(module, state_dict, prefix)
    module.load_report = report
    layers = computing_layers(module) if any(report.held.values()) else {}  # a checkpoint of the neck alone has none
    for name, layer in layers.items():
        layer.norm_stale = name in report.initialised
        if layer.removed.block is not None:
            lacking = _load_block_(layer.removed.block, state_dict, f'{prefix}{name}.') if layer.norm_stale else []
            layer.fit_wanted = layer.norm_stale and not lacking
            if lacking:
                logger.warning('%s is not fitted to the block that it replaces, which has no %s in the checkpoint',
                               name, listed(lacking))
    if report.initialised:
        for line in str(report).splitlines():
            logger.info('%s', line)
    state_dict.clear()
    state_dict.update(adapted)


def _check_unfinished(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Raise a ValueError if blocks that may still be replaced have no weights, although the model has some."""
    blocks = {name.rpartition('.')[0]: layer.removed.shapes for name, layer in computing_layers(model).items()
              if layer.provisional}
    gone = [name for name, shapes in blocks.items() if not any(f'{prefix}{name}.{key}' in state_dict for key in shapes)]
    if gone and any(key.startswith(prefix) for key in state_dict):
        raise ValueError(f'the config asks for a search for a plan, and these weights have none for {listed(gone)}, as '
                         'after a search that has replaced them; use the config with the plan that it has found: '
                         "<config>_found.py in its work dir, also in the checkpoint's meta['cfg'], or materialize the "
                         'checkpoint to search again')


def _with_copies(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """With a copy of a block's tensors for the provisional layer inside it; of those it shares, if it has others."""
    copies = {}
    for name, layer in computing_layers(model).items():
        block = f'{prefix}{name.rpartition(".")[0]}.'
        if layer.provisional:
            has_some = any(key.startswith(f'{prefix}{name}.') for key in state_dict)
            copies |= {f'{prefix}{name}.{key[len(block):]}': value for key, value in state_dict.items()
                       if key.startswith(block) and (not has_some or key[len(block):] in layer.untouched)}
    return state_dict | copies


def _own_buffers(layer: ComputingLayer, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Buffers that some modules make of their weights when they load: those of the removed block, from its weights."""
    made = {}
    for path, module in list(layer.template.named_modules()):
        start = f'{prefix}{path}.' if path else prefix
        shapes = {slot: layer.removed.shapes.get(f'{path}.{slot}' if path else slot) for slot in module._parameters}
        slots = [slot for slot, shape in shapes.items() if shape == getattr(state_dict.get(start + slot), 'shape', 0)]
        if not slots or not loads_its_own_way(module):
            continue
        twin = copy.copy(module)
        twin._parameters = {slot: nn.Parameter(state_dict[start + slot].clone()) for slot in slots}
        twin._buffers = {name: buffer.clone() for name, buffer in module._buffers.items()}
        type(module)._load_from_state_dict(twin, dict(state_dict), start, {}, False, [], [], [])
        made.update({start + name: buffer for name, buffer in twin._buffers.items()})
    return made


def _load_block_(block: nn.Module, state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Load a removed block's own tensors into it.

    Returns:
        The parameters without which it isn't the trained block. What no block has in the checkpoint, such as relative
        positions and offsets of deformable convolutions in a classifier's, stays as initialised, as in kept blocks.
    """
    own = dict(block.named_parameters()) | dict(block.named_buffers())
    given = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
    fitting = {key: value for key, value in given.items() if key not in own or value.shape == own[key].shape}
    missing = set(block.load_state_dict(fitting, strict=False).missing_keys)
    return [name for name, _ in block.named_parameters()
            if name in missing and any(key.endswith(f'.{name}') for key in state_dict)]


def _compare(model: nn.Module, state_dict: dict[str, Any], prefix: str, report: LoadReport) -> None:
    own = model.state_dict()
    for key, value in own.items():
        given = state_dict.get(prefix + key)
        if given is None:
            if not key.endswith('num_batches_tracked'):
                report.missing.append(key)
        elif given.shape != value.shape:
            report.mismatched[key] = (tuple(given.shape), tuple(value.shape))
        else:
            report.loaded.append(key)
    report.left_over.extend(key[len(prefix):] for key in state_dict
                            if key.startswith(prefix) and key[len(prefix):] not in own)


def listed(texts: list[str], count: int = 5, separator: str = ', ') -> str:
    """The first texts, and how many more there are."""
    more = f' and {len(texts) - count} more' if len(texts) > count else ''
    return separator.join(texts[:count]) + more if texts else 'nothing'
