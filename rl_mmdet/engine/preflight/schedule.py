"""Checks of optimizer, schedulers, hooks and loops beyond what their classes check."""
import math
from collections.abc import Iterator, Mapping
from multiprocessing import get_all_start_methods
from types import UnionType
from typing import Any, Union, get_args, get_origin

from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import (
    HOOKS,
    LOG_PROCESSORS,
    MODEL_WRAPPERS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    RUNNERS,
    Registry,
)
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn

from ..errors import UserError
from ..optim import RLLayerDecayOptimWrapperConstructor, RLOptimWrapperConstructor
from .guard import check_arguments, close, find_class, meant, names_in, parameters_of, shorten

MOST_LR = 1000.
"""Above it a learning rate is a mistake: 30 has been used, with LARS."""
DEFAULT_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint', 'visualization')
PARAMWISE = {'custom_keys', 'bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'dwconv_decay_mult',
             'flat_decay_mult', 'bypass_duplicate', 'dcn_offset_lr_mult'}
"""What MMEngine's own constructor reads of ``paramwise_cfg``; with another key it does nothing."""


def check_schedule(cfg: Config) -> None:
    """Check types, rates and options of the optimizer, and the kinds of hooks' and schedulers' arguments.

    Raises:
        UserError: the first mistake found.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    _check_type('runner_type', dict(type=cfg.get('runner_type', 'Runner')), RUNNERS)
    _check_type('model_wrapper_cfg', cfg.get('model_wrapper_cfg') or {}, MODEL_WRAPPERS, 'MMDistributedDataParallel')
    _check_type('optim_wrapper', wrapper, OPTIM_WRAPPERS, 'OptimWrapper')
    constructor = _check_type('optim_wrapper.constructor', dict(type=wrapper.get('constructor')),
                              OPTIM_WRAPPER_CONSTRUCTORS, 'DefaultOptimWrapperConstructor')
    if 'optimizer' in wrapper:
        optimizer = _check_type('optim_wrapper.optimizer', wrapper['optimizer'], OPTIMIZERS)
        for name, value in wrapper['optimizer'].items():
            _check_rate(f'optim_wrapper.optimizer.{name}', value, most=MOST_LR if name == 'lr' else None)
        _check_paramwise(wrapper.get('paramwise_cfg') or {}, constructor, optimizer)
    for place, node, registry in _typed(cfg):
        cls = find_class(registry, node.get('type'))
        if cls is not None:
            _check_kinds(place, node, cls, whole=registry is not PARAM_SCHEDULERS)
    _check_workers((cfg.get('env_cfg') or {}).get('mp_cfg') or {})
    for name in cfg.get('default_hooks') or {}:
        if name not in DEFAULT_HOOKS and close(name, DEFAULT_HOOKS, .8):
            raise UserError(f'default_hooks.{name}: a hook more beside the default ones{meant(name, DEFAULT_HOOKS)}')


def _check_workers(settings: Any) -> None:
    """Check ``env_cfg.mp_cfg``, of which MMEngine takes whatever comes."""
    if not isinstance(settings, Mapping):
        raise UserError(f"env_cfg.mp_cfg must be a dict such as dict(mp_start_method='fork'), got {settings!r}")
    _check_kinds('env_cfg.mp_cfg', settings, set_multi_processing)
    method, allowed = settings.get('mp_start_method', 'fork'), get_all_start_methods()
    if method not in allowed:
        raise UserError(f'env_cfg.mp_cfg.mp_start_method must be one of {", ".join(allowed)}, got {method!r}')


def check_step(wrapper: OptimWrapper, model: nn.Module) -> None:
    """Clip a gradient of zeros and make a step with it, as the first iteration will."""
    parameter = next((p for group in wrapper.optimizer.param_groups for p in group['params'] if p.requires_grad), None)
    if type(wrapper) is OptimWrapper and parameter is not None:
        parameter.grad = parameter.new_zeros(parameter.shape)
        wrapper.step()
        parameter.grad = None


def _check_type(setting: str, node: Any, registry: Registry, default: str | None = None) -> Any:
    """The class that a setting names."""
    if not isinstance(node, Mapping):
        raise UserError(f'{setting} must be a dict such as dict(type={default or "SGD"!r}), got {node!r}')
    name = node.get('type', default) or (default if setting.endswith('constructor') else None)
    cls = find_class(registry, name)
    if cls is None:
        setting = setting if setting.endswith(('constructor', 'runner_type')) else f'{setting}.type'
        raise UserError(f'{setting}: unknown type {name!r}{meant(name, names_in(registry))}')
    return cls


def _check_rate(setting: str, value: Any, most: float | None) -> None:
    """Refuse infinities and NaN; with ``most``, whatever isn't a number up to it, or None."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if most is not None and value is not None and not (number and 0 <= value <= most):
        raise UserError(f'{setting} must be a number of 0 to {most:g}, got {value!r}')
    if number and not math.isfinite(value):
        raise UserError(f'{setting} must be finite, got {value!r}')


def _check_paramwise(options: Any, constructor: Any, optimizer: Any) -> None:
    """Refuse options of MMEngine's constructor, and of ours, that it doesn't read."""
    if constructor not in (DefaultOptimWrapperConstructor, RLOptimWrapperConstructor,
                           RLLayerDecayOptimWrapperConstructor) or not isinstance(options, Mapping):
        return
    known = PARAMWISE | ({'layer_decay_rate'} if constructor is RLLayerDecayOptimWrapperConstructor else set())
    for key in options:
        if key not in known:
            raise UserError(f'optim_wrapper.paramwise_cfg.{key}: {constructor.__name__} doesn\'t read it'
                            f'{meant(key, known)}')
    known = {'lr_mult', 'decay_mult', *parameters_of(optimizer)} - {'params'}
    keys = options.get('custom_keys')
    for pattern, settings in keys.items() if isinstance(keys, Mapping) else ():
        for key, value in settings.items() if isinstance(settings, Mapping) else ():
            place = f'optim_wrapper.paramwise_cfg.custom_keys[{pattern!r}].{key}'
            if key not in known:
                raise UserError(f'{place}: nobody reads it{meant(key, known)}')
            if key in ('lr_mult', 'decay_mult') and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise UserError(f'{place} must be a finite number, got {value!r}')


def _typed(cfg: Config) -> Iterator[tuple[str, Mapping, Registry]]:
    """Hooks, schedulers and the log's settings, with their settings' names and their registries."""
    for section, registry in (('default_hooks', HOOKS), ('custom_hooks', HOOKS), ('param_scheduler', PARAM_SCHEDULERS),
                              ('log_processor', LOG_PROCESSORS)):
        nodes = cfg.get(section) or {}
        nodes = {'': nodes} if 'type' in nodes else dict(enumerate(nodes)) if isinstance(nodes, list) else nodes
        for name, node in nodes.items():
            if isinstance(node, Mapping):
                yield f'{section}.{name}'.rstrip('.'), node, registry


def _check_kinds(place: str, node: Mapping, cls: Any, whole: bool = True) -> None:
    """Compare values with a class's type annotations, where these are plain; a default value is always right.

    ``whole=False`` takes numbers of any kind for integers: schedulers do, as for half an epoch.
    """
    check_arguments(place, node, cls, .8)
    for name, parameter in parameters_of(cls).items():
        hint = parameter.annotation
        if name in node and node[name] is not parameter.default and not _fits(node[name], hint, whole):
            shown = getattr(hint, '__name__', str(hint)) if not get_args(hint) else str(hint).replace('typing.', '')
            raise UserError(f'{place}.{name} must be {shown}, got {shorten(node[name])}')


def _fits(value: Any, hint: Any, whole: bool = True) -> bool:
    """Whether a value is of an annotated type; True for annotations that this doesn't know."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one, whole) for one in get_args(hint))
    if hint is int and whole:
        return isinstance(value, int)
    if hint in (int, float):
        return isinstance(value, (int, float))
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if (origin or hint) in (list, tuple):
        return isinstance(value, (list, tuple))
    if (origin or hint) is dict:
        return isinstance(value, Mapping)
    return True
