"""One line for whatever a part of a run raises while it is built: which setting, its value, what is allowed."""
import difflib
import inspect
import logging
import re
import reprlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from io import StringIO
from typing import Any, TypeVar

from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import Registry
from mmengine.visualization import Visualizer

from ..config import type_name
from ..errors import UserError

T = TypeVar('T')
TRIAL_SECONDS = 5.
"""How long settings may be left out one by one, to find the one that a part can't be built with."""
ELSEWHERE = re.compile('process group|implementation for device|not compiled with CUDA|only supports? GPU|CUDA')
"""Errors that say only that this process, on the CPU and alone, can't do what the run will."""


def built(cfg: Config, setting: str, build: Callable[[Config], T], must: bool = False) -> T | None:
    """``build(cfg)``: the part of a run that ``setting`` describes; None if it can be built only where the run will be.

    Args:
        cfg: a config; it stays as it is.
        setting: dotted key of the part's settings.
        build: builds the part from a copy of the config.
        must: it can be built here.

    Raises:
        UserError: whatever ``build`` raises, in one line with the setting that is to blame, its value and the reason.
    """
    try:
        return _build(cfg, build)
    except UserError:
        raise
    except Exception as error:  # parts raise whatever they like
        if ELSEWHERE.search(str(error)) and not must:
            return None
        raise UserError(_blame(cfg, setting, build, error)) from error


@contextmanager
def nothing_global() -> Iterator[None]:
    """Forget afterwards which loggers and the like were made meanwhile, by the names by which MMEngine finds them.

    Until then the current ones are new: a log that shows errors only, and a message hub without a training in it.
    """
    made = {cls: dict(cls._instance_dict) for cls in (MMLogger, MessageHub, Visualizer)}
    try:
        MMLogger.get_instance(f'preflight_{time.monotonic_ns()}', log_level='ERROR')
        MessageHub.get_instance(f'preflight_{time.monotonic_ns()}')
        yield
    finally:
        for cls, before in made.items():
            cls._instance_dict.clear()
            cls._instance_dict.update(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is logged or printed meanwhile: the run itself will say it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def named(setting: str) -> Iterator[None]:
    """Put the setting's name in front of a UserError's text."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{setting}: {error}') from error


def reason_of(error: BaseException) -> str:
    """An error's text in one line, without the chain of classes that registries put in front of it."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    lines = re.sub(r'class `\w+` in \S+: ', '', text).strip().splitlines()
    if isinstance(error, AssertionError) and not lines:
        lines = [traceback.extract_tb(error.__traceback__)[-1].line or 'an assertion failed']
    known = isinstance(error, (ValueError, AssertionError, OSError)) and lines or ' ' in ''.join(lines)
    return lines[0] if known else f'{type(error).__name__}: {"".join(lines[:1])}'


def shorten(value: Any) -> str:
    """A value as a config shows it, at most about 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else reprlib.repr(value)[:100]


def close(name: Any, known: Iterable[str], cutoff: float = .6) -> list[str]:
    """The known names that one may be a misspelling of, the closest first."""
    return difflib.get_close_matches(str(name), sorted(known), 3, cutoff)


def meant(name: Any, known: Iterable[str]) -> str:
    """A question with the known names that are close to one, or the allowed names."""
    known = sorted(known)
    if close(name, known):
        return f'; did you mean {" or ".join(close(name, known))}?'
    return f'; allowed: {", ".join(known)}' if len(known) <= 25 else ''


def find_class(registry: Registry, name: Any) -> Callable | None:
    """The class of that name in a registry or its parents, as a config of the current scope means it."""
    if not isinstance(name, str) or not name:
        return name if callable(name) else None
    with registry.switch_scope_and_registry(None) as inner:
        return inner.get(name)


def names_in(registry: Registry) -> set[str]:
    """The names in a registry as the current scope sees it, and in its parents."""
    names: set[str] = set()
    with registry.switch_scope_and_registry(None) as inner:
        while inner is not None:
            names |= set(inner.module_dict)
            inner = inner.parent
    return names


def parameters_of(cls: Callable) -> dict[str, inspect.Parameter]:
    """The arguments that a function or a class takes, its parents' included where it passes them on."""
    found: dict[str, inspect.Parameter] = {}
    for function in [vars(base)['__init__'] for base in cls.__mro__ if '__init__' in vars(base)] if inspect.isclass(
            cls) else [cls]:
        own = inspect.signature(function).parameters.values()
        found = {p.name: p for p in own if p.name != 'self' and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} | found
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


def check_arguments(place: str, node: Mapping, cls: Callable, cutoff: float) -> None:
    """Refuse misspelt arguments, for classes that take all that comes and fail much later, or never."""
    known = parameters_of(cls)
    for name in node:
        if name not in (*known, 'type') and close(name, known, cutoff):
            raise UserError(f'{place}.{name}: {cls.__name__} doesn\'t read it{meant(name, known)}')


def _build(cfg: Config, build: Callable[[Config], T]) -> T:
    with quiet():
        return build(Config(deepcopy(cfg._cfg_dict)))


def _blame(cfg: Config, setting: str, build: Callable, error: Exception) -> str:
    """The line for an error: the setting that is to blame, as far as that can be found out, and the reason."""
    reason, root = reason_of(error), tuple(setting.split('.'))
    places = list(places_in(cfg, *root))
    about_type = _blame_type(cfg, [*places, root], reason, error)
    if about_type:
        return about_type
    unknown = re.search(r'(\S+) is not in the .*registry', reason)
    keyword = re.search(r"unexpected keyword argument '(\w+)'", reason)
    cls = _local(error, 'obj_cls')
    places.sort(key=lambda place: type_name(at(cfg, place[:-1])) != type_name(cls))
    for place in places:
        if unknown and place[-1] == 'type' and at(cfg, place) == unknown[1]:
            registry = _local(error, 'registry')
            known = meant(unknown[1], names_in(registry)) if isinstance(registry, Registry) else ''
            return f'{".".join(place)}: unknown type {unknown[1]!r}{known}'
        if keyword and place[-1] == keyword[1]:
            return f'{".".join(place)}: ' + (f'{cls.__name__} takes no {keyword[1]}'
                                             f'{meant(keyword[1], parameters_of(cls))}' if cls else reason)
    place = None if _explains_itself(error) else _culprit(cfg, places, build)
    transform = type(_local(error, 't')).__name__
    reason = f'{transform}: {reason}' if TRANSFORMS.get(transform) else reason
    return f'{".".join(place)}={shorten(at(cfg, place))}: {reason}' if place else f'{setting}: {reason}'


def _blame_type(cfg: Config, places: Iterable[tuple[str, ...]], reason: str, error: Exception) -> str | None:
    """The line for a ``type`` that is missing, misspelt or no name; None if the error is about something else."""
    if 'type must be a str' in reason:
        found = [place for place in places if place[-1] == 'type' and not isinstance(at(cfg, place), str)]
        return f'{".".join(found[0])} must be the name of a class, got {shorten(at(cfg, found[0]))}' if found else None
    if 'must contain the key "type"' not in reason and "keyword argument '_scope_'" not in reason:
        return None
    untyped = {place: node for place in places if isinstance(node := at(cfg, place), Mapping) and 'type' not in node}
    for place, node in untyped.items():
        if wrong := close('type', node, .75):
            return f'{".".join(place)}.{wrong[0]}: nobody reads it; did you mean type?'
    given = _local(error, 'cfg')
    for place, node in untyped.items():
        if '_scope_' in reason and '_scope_' in node or isinstance(given, Mapping) and all(
                key in given and given[key] == node[key] for key in node):
            return f'{".".join(place)}.type: it is missing'
    return None


def _culprit(cfg: Config, places: Iterable[tuple[str, ...]], build: Callable) -> tuple[str, ...] | None:
    """The innermost setting without which the part can be built; None if there is no such one."""
    end = time.process_time() + TRIAL_SECONDS
    for place in places:
        if time.process_time() > end:
            return None
        if place[-1] in ('type', 'dataset', 'ann_file', 'pipeline') or isinstance(at(cfg, place), bool):
            continue
        trial = Config(deepcopy(cfg._cfg_dict))
        holder = at(trial, place[:-1])
        holder.pop(int(place[-1]) if isinstance(holder, list) else place[-1])
        try:
            _build(trial, build)
        except Exception:  # the same error, another one, or a setting that must be there
            continue
        return place
    return None


def _explains_itself(error: Exception) -> bool:
    """Whether an error's text begins with a setting's name, as those of this package do."""
    return isinstance(error, (ValueError, TypeError)) and bool(re.match(r'[\w.\[\]]+(:| must) ', reason_of(error)))


def at(cfg: Any, place: tuple[str, ...]) -> Any:
    """The value at a place, or None."""
    for key in place:
        if isinstance(cfg, (list, tuple)):
            cfg = cfg[int(key)]
        else:
            cfg = cfg.get(key) if isinstance(cfg, (Mapping, Config)) else None
    return cfg


def places_in(cfg: Any, *place: str) -> Iterator[tuple[str, ...]]:
    """The places of all settings inside one, the innermost first; a place is the keys that lead there."""
    value = at(cfg, place)
    keys = list(value) if isinstance(value, Mapping) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from places_in(cfg, *place, str(key))
        yield (*place, str(key))


def _local(error: Exception, name: str) -> Any:
    """The value of a local variable in the innermost function that had one of that name when the error was raised."""
    found = [frame.f_locals[name] for frame, _ in traceback.walk_tb(error.__traceback__) if name in frame.f_locals]
    return found[-1] if found else None
