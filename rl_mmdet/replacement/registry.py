"""Where plans, fusions, operators and starts are named, and how a setting of a config becomes one of them."""
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.registry import Registry

PLANS = Registry('plan', scope='rl_mmdet')
FUSIONS = Registry('fusion', scope='rl_mmdet')
OPERATORS = Registry('operator', scope='rl_mmdet')
STARTS = Registry('start', scope='rl_mmdet')


def build_setting(registry: Registry, cfg: Any, default: str, setting: str = '') -> Any:
    """Build one setting of a config, with errors that name the setting and what is allowed.

    Args:
        registry: of the classes that are allowed.
        cfg: ``dict(type=NAME, **arguments)``, an object that is ready (returned as it is), or None for the
            default.
        default: the type to use when ``cfg`` is None or names none.
        setting: how messages call it; ``replacement.`` and the registry's name by default.

    Raises:
        TypeError: ``cfg`` is neither a dict nor an object of a registered class.
        ValueError: unknown type, unknown or missing argument, or a value that the class refuses.
    """
    setting = setting or f'replacement.{registry.name}'
    classes = registry.module_dict
    if cfg is None:
        cfg = {}
    if isinstance(cfg, tuple(classes.values())):
        return cfg
    if not isinstance(cfg, Mapping):
        raise TypeError(f'{setting} must be a dict such as dict(type={default!r}), got {cfg!r}')
    arguments = dict(cfg)
    name = arguments.pop('type', default)
    cls = class_of(registry, name)
    if cls is None:
        raise ValueError(f'{setting}: unknown type {name!r}; allowed: {", ".join(sorted(classes))}')
    return call_checked(cls, arguments, setting)


def class_of(registry: Registry, kind: Any) -> type | None:
    """The registered class that a ``type`` means: its name, also with scope or module in front, or the class itself."""
    name = kind.rpartition('.')[2] if isinstance(kind, str) else None
    return next((cls for key, cls in registry.module_dict.items() if kind is cls or name in (key, cls.__name__)), None)


def call_checked(cls: Callable, arguments: dict, setting: str) -> Any:
    """Call ``cls(**arguments)`` after checking the arguments' names against its signature. Errors as above."""
    parameters = inspect.signature(cls).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    allowed = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    names = [parameter.name for parameter in allowed]
    for key in arguments:
        if key not in names and not takes_any:
            raise ValueError(f'{setting}: {cls.__name__} has no argument {key!r}; '
                             f'allowed: {", ".join(names) or "none"}; if it is inherited from the settings of another '
                             'type, add _delete_=True')
    for parameter in allowed:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise ValueError(f'{setting}: {cls.__name__} needs the argument {parameter.name!r}')
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f'{setting}: {error}') from None
