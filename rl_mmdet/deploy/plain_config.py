"""The config of a materialized detector, without what Replacement Learning has added to it."""
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import mmdet.registry
import mmengine.registry
from mmdet.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.config import Config
from mmengine.registry import HOOKS, Registry

from ..engine import RLLayerDecayOptimWrapperConstructor
from ..engine.config import add_import_, nested_dicts
from ..engine.preflight.guard import find_class
from ..engine.search import found_config
from ..models.backbones import build_rl_backbone
from ..models.backbones.replacement_mixin import ARGUMENTS
from ..models.backbones.rl_backbone import is_rl_backbone
from ..replacement import FUSIONS, OPERATORS
from ..replacement.operators import FullBlock
from ..replacement.registry import build_setting

PACKAGE = __name__.partition('.')[0]
NO_OTHER_HAS = (RLLayerDecayOptimWrapperConstructor,)
"""Types of ours whose settings no class that they extend knows."""


def plain_config(cfg: Config) -> tuple[Config, list[str]]:
    """The config that builds what :func:`~rl_mmdet.replacement.materialize` makes of a config's detector.

    Backbones are of the type that the RL ones extend, and settings, hooks, constructor and import of rl_mmdet are gone.
    Backbones from timm, those whose blocks are light operators now, and a ViT's layer decay are still rl_mmdet's.

    Args:
        cfg: of a trained detector; not changed.

    Returns:
        The config, and the types in it for which it needs rl_mmdet.
    """
    cfg = found_config(cfg)
    cfg.load_from = None
    for name in ARGUMENTS:  # that the recipes in configs/_base_ have at the top
        cfg.pop(name, None)
    cfg.model = _plain(cfg.model)
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if not _is_ours(find_class(HOOKS, hook['type']))]
    for node, key, registry in (((cfg.get('default_hooks') or {}).get('checkpoint') or {}, 'type', HOOKS),
                                (cfg.get('optim_wrapper') or {}, 'constructor', OPTIM_WRAPPER_CONSTRUCTORS)):
        if node.get(key):
            node[key] = _extended(registry, node[key])
    types = {str(node.get(key)).rpartition('.')[2] for node in nested_dicts(cfg.to_dict())
             for key in ('type', 'constructor')}
    needs = sorted(types & _names_of_ours())
    _drop_import_(cfg)
    if needs:
        add_import_(cfg)
    return cfg, needs


def _plain(node: Any) -> Any:
    """A copy of a config value with plain backbones."""
    if isinstance(node, (list, tuple)):
        return type(node)(map(_plain, node))
    if not isinstance(node, Mapping):
        return node
    node = {key: _plain(value) for key, value in node.items()}
    cls = find_class(MODELS, node.get('type'))
    if not is_rl_backbone(cls):
        return node
    replacement = node.get('replacement')
    plain = {key: value for key, value in node.items() if key not in ARGUMENTS}
    operator = build_setting(OPERATORS, (replacement or {}).get('operator'), default='FullBlock')
    if not isinstance(operator, FullBlock):
        blocks = MODELS.build(deepcopy(node)).replacement_report.replaced
        adapt = build_setting(FUSIONS, replacement.get('fusion'), default='ScalarFusion').adapt
        return plain | dict(replacement=dict(
            plan=dict(type='Blocks', blocks=blocks), fusion=dict(type='OwnWeights', adapt=adapt),
            operator=replacement['operator']))
    if cls is build_rl_backbone and plain.get('backbone') is not None:
        backbone = plain.pop('backbone')
        return _plain(plain | (backbone if isinstance(backbone, Mapping) else dict(type=backbone)))
    return plain | dict(type=_extended(MODELS, plain['type']))


def _extended(registry: Registry, kind: str | type) -> str | type:
    """The name of the registered type that one of ours extends; any other type as it is."""
    cls = find_class(registry, kind)
    bases = cls.__mro__ if isinstance(cls, type) and _is_ours(cls) and cls not in NO_OTHER_HAS else ()
    base = next((base for base in bases if not _is_ours(base) and registry.get(base.__name__) is base), None)
    if base is None:
        return kind
    scope = kind.rpartition('.')[0] if isinstance(kind, str) else PACKAGE
    return '.'.join(filter(None, (base.__module__ if scope.startswith(PACKAGE) else scope, base.__name__)))


def _is_ours(item: Any) -> bool:
    return getattr(item, '__module__', '').startswith(f'{PACKAGE}.')


def _names_of_ours() -> set[str]:
    """What rl_mmdet has registered for configs."""
    registries = [each for module in (mmengine.registry, mmdet.registry) for each in vars(module).values()
                  if isinstance(each, Registry)]
    return {name for registry in registries for name, item in registry.module_dict.items() if _is_ours(item)}


def _drop_import_(cfg: Config) -> None:
    """Let a config no longer import rl_mmdet."""
    imports = cfg.pop('custom_imports', None)
    names = imports['imports'] if imports else []
    names = [name for name in ([names] if isinstance(names, str) else names) if name.partition('.')[0] != PACKAGE]
    if names:
        cfg.custom_imports = dict(imports, imports=names)
