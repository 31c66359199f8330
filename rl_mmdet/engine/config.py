"""Configs: read one with its command-line options, and add the hooks that Replacement Learning needs."""
import os.path as osp
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.registry import Registry

from ..replacement import PLANS
from ..replacement.registry import class_of
from ..search import TRANSFERS
from .errors import UserError, first_line

SYNCHRONISED = ('SyncBN', 'MMSyncBN', 'SyncBatchNorm')
OF_WORKERS = ('prefetch_factor', 'timeout', 'multiprocessing_context')
"""Settings of a data loader that make no sense without worker processes."""
LOADERS_AND_EVALUATORS = ('train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator', 'test_evaluator')
CONSTRUCTORS = {None: 'RLOptimWrapperConstructor', 'DefaultOptimWrapperConstructor': 'RLOptimWrapperConstructor',
                'LearningRateDecayOptimizerConstructor': 'RLLearningRateDecayOptimizerConstructor'}
"""What stands in the place of MMEngine's and MMDetection's optimizer-wrapper constructors."""
KINDS = {
    (Mapping,): ('model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'train_cfg', 'val_cfg', 'test_cfg',
                 'optim_wrapper', 'default_hooks', 'randomness', 'env_cfg', 'auto_scale_lr', 'visualizer',
                 'log_processor', 'model_wrapper_cfg'),
    (list, tuple): ('custom_hooks',),
    (Mapping, list, tuple): ('param_scheduler', 'val_evaluator', 'test_evaluator'),
    (Mapping, bool): ('compile',),
    (bool,): ('resume', 'find_unused_parameters'),
    (str,): ('work_dir', 'load_from', 'experiment_name', 'default_scope'),
}
"""What the top-level settings may be, beside None."""


def load_config(path: str, options: Mapping[str, Any] | None = None, work_dir: str | None = None,
                launcher: str = 'none') -> Config:
    """Read a config file, apply ``--cfg-options`` and settle the work dir and the scope, ``mmdet`` without another one.

    ``data_root=DIR`` among the options moves the whole config there: every dataset and evaluator path that began
    with the config's own ``data_root`` begins with ``DIR`` afterwards.

    Args:
        path: config file; ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py`` is MMDetection's own, as in ``_base_``.
        options: overrides by dotted key.
        work_dir: where to write; default the config's own, else ``./work_dirs/<config stem>``.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.

    Raises:
        UserError: the file can't be read or parsed, an option doesn't fit it, or a top-level setting is of another
            kind than MMEngine takes.
    """
    try:
        cfg = get_config(path) if '::' in path else Config.fromfile(path)
        _settle_types_(cfg)
    except Exception as error:  # mmengine raises whatever the config's own Python code raises
        raise UserError(f'config {path}: {first_line(error)}') from error
    old_root = cfg.get('data_root')
    try:
        cfg.merge_from_dict(dict(options or {}))
    except (AssertionError, KeyError, TypeError, IndexError) as error:
        raise UserError(f'--cfg-options: {first_line(error)}') from error
    if options and 'data_root' in options:
        _move_data_root_(cfg, old_root, str(options['data_root']))
    for kinds, names in KINDS.items():
        for name in names:
            if cfg.get(name) is not None and not isinstance(cfg[name], kinds):
                allowed = ' or '.join('dict' if kind is Mapping else kind.__name__ for kind in kinds)
                raise UserError(f'{name} must be a {allowed}, got {cfg[name]!r}')
    imports = (cfg.get('custom_imports') or {}).get('imports', [])
    names = imports if isinstance(imports, (list, tuple)) else [imports]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"custom_imports.imports must be a list of modules such as ['rl_mmdet'], got {imports!r}")
    if cfg.get('launcher') not in (None, 'none', 'pytorch', 'slurm', 'mpi'):
        raise UserError(f'launcher: the option --launcher says it; the config has {cfg.launcher!r}')
    cfg.launcher = launcher
    cfg.default_scope = cfg.get('default_scope', 'mmdet')
    cfg.work_dir = work_dir or cfg.get('work_dir') or osp.join('work_dirs', osp.splitext(osp.basename(path))[0])
    return cfg


def add_rl_defaults_(cfg: Config) -> Config:
    """Add, where they are absent, the hooks and the optimizer-wrapper constructor that RL training needs.

    Every config gets ``FiniteLossHook`` and ``ResumeHook``, and ``WholeCheckpointHook`` for MMEngine's hook. One with a
    ``replacement`` also gets ``StartHook`` and ``LearningStepsHook``, and our constructors in place of MMEngine's
    default one and MMDetection's for layer decay; another constructor stays. One that searches gets ``SearchHook``, and
    where it searches for a plan DDP is told that a step doesn't use all parameters.
    """
    hooks = list(cfg.get('custom_hooks') or [])
    wanted = ['FiniteLossHook', 'ResumeHook']
    if uses_replacement(cfg):
        wanted += ['StartHook', 'LearningStepsHook']
        wrapper = cfg.get('optim_wrapper')
        constructor = wrapper and CONSTRUCTORS.get(type_name(wrapper.get('constructor')))
        if constructor:
            wrapper.constructor = constructor
    default = cfg.get('default_hooks') or {}
    if 'checkpoint' not in default:
        cfg.default_hooks = ConfigDict(default, checkpoint=dict(type='CheckpointHook', interval=1))  # MMEngine's own
    checkpoint = cfg.default_hooks.get('checkpoint') or {}
    if type_name(checkpoint) == 'CheckpointHook':
        checkpoint.type = 'WholeCheckpointHook'
    present = {type_name(hook) for hook in hooks if isinstance(hook, Mapping)}
    cfg.custom_hooks = hooks + [ConfigDict(type=name) for name in wanted if name not in present]
    keys = [key for _, key in searches_of(cfg)]
    if keys and 'SearchHook' not in present:
        before = (cfg.get('model_wrapper_cfg') or cfg).get('find_unused_parameters', False)
        cfg.custom_hooks.append(ConfigDict(type='SearchHook', find_unused_parameters=bool(before)))
    if 'plan' in keys:
        set_unused_(cfg, True)
    return cfg


def add_import_(cfg: Config) -> list[str]:
    """Let the config import ``rl_mmdet``, so that the one that a run leaves can be read without our tools.

    Returns:
        A text for the log if it didn't yet.
    """
    imports = dict(cfg.get('custom_imports') or dict(imports=[], allow_failed_imports=False))
    names = [imports['imports']] if isinstance(imports['imports'], str) else list(imports['imports'])
    if any(name.partition('.')[0] == 'rl_mmdet' for name in names):
        return []
    cfg.custom_imports = ConfigDict(imports, imports=[*names, 'rl_mmdet'])
    return ["custom_imports: 'rl_mmdet' is added in the work dir's config; other tools need it in yours, too"]


def for_one_process(node: Any) -> Any:
    """A copy of a config value with BatchNorm in the place of what is synchronised between processes."""
    if isinstance(node, Mapping):
        own = {key: for_one_process(value) for key, value in node.items()}
        return own | (dict(type='BN') if type_name(own) in SYNCHRONISED else {})
    return type(node)(map(for_one_process, node)) if isinstance(node, (list, tuple)) else node


def without_workers(loader: Mapping) -> dict[str, Any]:
    """A data loader's settings in which it has no processes of its own."""
    return {key: value for key, value in loader.items() if key not in OF_WORKERS} | dict(
        num_workers=0, persistent_workers=False)


def uses_replacement(cfg: Config) -> bool:
    """Whether any part of the model has a ``replacement`` setting."""
    return any(node.get('replacement') is not None for node in nested_dicts(cfg.get('model') or {}))


def searches_of(cfg: Config) -> list[tuple[Any, str]]:
    """The model's settings that a search has to find: pairs of the dict that has the setting, and its key there."""
    nodes = [(node, key) for node in nested_dicts(cfg.get('model') or {}) for key in ('plan', 'transfer')]
    return [(node, key) for node, key in nodes if _searches(node.get(key), PLANS if key == 'plan' else TRANSFERS)]


def set_unused_(cfg: Config, find: bool) -> None:
    """Set whether DDP looks for parameters that a step doesn't use."""
    cfg.find_unused_parameters = find
    if cfg.get('model_wrapper_cfg'):
        cfg.model_wrapper_cfg.find_unused_parameters = find


def nested_dicts(node: Any) -> Iterator[Mapping]:
    """Every dict in a config value, from the outside in."""
    if isinstance(node, Mapping):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from nested_dicts(child)


def type_name(setting: Any) -> str | None:
    """The name of a setting's type, or of a type itself, without scope and module; None if it has none.

    New-style configs have classes there, and what MMEngine makes of them in a dumped config: ``'mmdet.models.ResNet'``.
    """
    kind = setting.get('type') if isinstance(setting, Mapping) else setting
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', None)


def _searches(setting: Any, registry: Registry) -> bool:
    """Whether a setting's type is one that is learned during training."""
    return isinstance(setting, Mapping) and getattr(class_of(registry, setting.get('type')), 'searches', False)


def _settle_types_(cfg: Config) -> None:
    """Import the types of a new-style config, and leave out what else it imports; an ImportError if that fails.

    A dumped config has its classes by module and name. That doesn't do for weights to load, and for MMCV's ``nms`` and
    RoI layers: MMEngine, MMCV and MMDetection know these only by the names that old-style configs have.
    """
    for name in set(cfg) - set(cfg.to_dict()):
        dict.pop(cfg._cfg_dict, name)  # ConfigDict's own would import it
    for node in nested_dicts(cfg._cfg_dict):
        kind, name = node.get('type'), type_name(node)
        module = kind if isinstance(kind, str) else str(getattr(kind, '__module__', ''))
        if name == 'PretrainedInit':
            node['type'] = 'Pretrained'
        elif module.startswith('mmcv.ops.') and (name.islower() or 'RoI' in name):
            node['type'] = name


def _move_data_root_(cfg: Config, old: str | None, new: str) -> None:
    """Replace the old data root in every path of a dataset or evaluator that begins with it."""
    if not old:
        raise UserError('--cfg-options data_root=...: the config has no top-level data_root to move; set the '
                        "datasets' own data_root instead")
    new, old = osp.join(osp.expanduser(new), ''), osp.join(old, '')
    cfg.data_root = new
    for key in LOADERS_AND_EVALUATORS:
        for node in nested_dicts(cfg.get(key) or {}):
            for name, value in node.items():
                if isinstance(value, str) and osp.join(value, '').startswith(old):
                    node[name] = new + value[len(old):].lstrip('/')
