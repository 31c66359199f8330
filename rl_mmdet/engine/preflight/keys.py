"""Settings that nobody reads, and values that nobody would complain about."""
import inspect
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from mmdet.registry import TASK_UTILS
from mmengine.config import Config
from mmengine.runner import Runner

from ...models.backbones.replacement_mixin import ARGUMENTS
from ..config import nested_dicts, type_name
from ..errors import UserError
from .guard import at, check_arguments, close, find_class, meant, places_in

READ = {*inspect.signature(Runner.__init__).parameters, 'activation_checkpointing', 'compile', 'custom_imports',
        'efficient_conv_bn_eval', 'find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn',
        'tta_model', 'tta_pipeline'} - {'self', 'cfg'}
"""The top-level settings that a run reads; others are variables for these."""
OF_MMDET_2 = {
    'optimizer': 'optim_wrapper=dict(optimizer=...)', 'optimizer_config': 'optim_wrapper=dict(clip_grad=...)',
    'lr_config': 'param_scheduler=[...]', 'runner': 'train_cfg=dict(max_epochs=...)',
    'total_epochs': 'train_cfg=dict(max_epochs=...)', 'data': 'train_dataloader, val_dataloader and test_dataloader',
    'checkpoint_config': 'default_hooks=dict(checkpoint=...)', 'log_config': 'default_hooks=dict(logger=...)',
    'evaluation': 'val_evaluator and train_cfg=dict(val_interval=...)',
    'fp16': "optim_wrapper=dict(type='AmpOptimWrapper')", 'resume_from': "load_from='...' and resume=True"}
"""Top-level settings of MMDetection 2, and what to write today."""
COUNTS = ('train_cfg.max_epochs', 'train_cfg.max_iters', 'train_cfg.val_interval', 'train_dataloader.batch_size',
          'val_dataloader.batch_size', 'test_dataloader.batch_size', 'auto_scale_lr.base_batch_size',
          'log_processor.window_size')
"""Settings that must be integers of at least 1."""
CHOICES = {'style': ('pytorch', 'caffe'), 'nms.type': ('nms', 'soft_nms', 'nms_rotated', 'nms_quadri')}
"""What settings of a model may be; MMDetection takes other values for one of these, or stumbles much later."""
ENDLESS = ('InfiniteSampler', 'MultiSourceSampler', 'GroupMultiSourceSampler')
"""Samplers for training by iterations."""
LOOKED_FOR = {
    'test_cfg': ('score_thr', 'nms', 'iou_threshold', 'max_per_img', 'max_per_image', 'nms_pre', 'min_bbox_size',
                 'mask_thr_binary'),
    'nms': ('type', 'iou_threshold', 'class_agnostic', 'split_thr', 'max_num', 'score_threshold', 'min_score', 'sigma',
            'method', 'offset'),
    'filter_cfg': ('filter_empty_gt', 'min_size', 'bbox_min_size'),
    'auto_scale_lr': ('enable', 'base_batch_size'),
    'env_cfg': ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'),
    'dist_cfg': ('backend', 'timeout'),
}
"""Settings in whose dicts MMDetection and MMEngine look for these keys, and leave all others alone."""
NOTHING_ELSE = ('auto_scale_lr', 'env_cfg')
"""Those that have no use for any other key."""
PACKAGES = {'WandbVisBackend': ('wandb', ), 'TensorboardVisBackend': ('tensorboard', 'tensorboardX'),
            'MLflowVisBackend': ('mlflow', ), 'ClearMLVisBackend': ('clearml', ), 'NeptuneVisBackend': ('neptune', ),
            'DVCLiveVisBackend': ('dvclive', ), 'AimVisBackend': ('aim', )}
"""What MMEngine's backends import when a run begins, each any of these."""
CLOSE = .85
"""How much alike a key and a known one must be for it to be a misspelt one."""


def check_keys(cfg: Config) -> list[str]:
    """Check top-level keys, counts, and texts that spell a truth value.

    Returns:
        The top-level settings that neither a run nor another setting uses.

    Raises:
        UserError: such a setting is a misspelt one, or one that belongs elsewhere; or a value is of the wrong kind.
    """
    used = [cfg[key] for key in cfg if key in READ]
    unread = [key for key in cfg if key not in READ and not _occurs(cfg[key], used)]
    model = cfg.get('model') or {}
    for key in cfg:
        of_model = key in ARGUMENTS or key in model and key not in READ
        variable = type_name(cfg[key]) and type_name(cfg[key]) == type_name(model.get(key))  # such as semi's detector
        if of_model and not variable and not any(key in node and node[key] == cfg[key] for node in nested_dicts(model)):
            raise UserError(f'{key}: nobody reads it here; write '
                            f'model=dict({f"backbone=dict({key}=...)" if key in ARGUMENTS else f"{key}=..."})')
        if key in unread and close(key, READ - {'tta_model', 'tta_pipeline'}, CLOSE):
            raise UserError(f'{key}: nobody reads it{meant(key, READ)}')
        if key in unread and key in OF_MMDET_2 and (key != 'data' or {'train', 'samples_per_gpu'} & set(cfg.data)):
            raise UserError(f'{key}: it is of MMDetection 2, and nobody reads it; write {OF_MMDET_2[key]}')
    for place in COUNTS:
        section, name = place.split('.')
        value = (cfg.get(section) or {}).get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
                value >= 1 and float(value).is_integer()):
            raise UserError(f'{place} must be an integer of at least 1, got {value!r}')
    for phase in ('train', 'val', 'test'):
        workers = (cfg.get(f'{phase}_dataloader') or {}).get('num_workers', 0)
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise UserError(f'{phase}_dataloader.num_workers must be an integer of at least 0, got {workers!r}')
    for phase, names in (('train', ('train_dataloader', 'train_cfg', 'optim_wrapper')),
                         *((phase, (f'{phase}_dataloader', f'{phase}_cfg', f'{phase}_evaluator'))
                           for phase in ('val', 'test'))):
        missing = [name for name in names if cfg.get(name) is None]
        if missing and len(missing) < 3:
            raise UserError(f'{missing[0]}: it is missing; {phase} needs {", ".join(names)}, or none of them')
    level = cfg.get('log_level') or 'INFO'
    if not (isinstance(level, int) or isinstance(level, str) and isinstance(logging.getLevelName(level), int)):
        raise UserError(f'log_level: unknown level {cfg.log_level!r}; allowed: DEBUG, INFO, WARNING, ERROR')
    seed = (cfg.get('randomness') or {}).get('seed')
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise UserError(f'randomness.seed must be an integer of 0 to {2**32 - 1}, or None, got {seed!r}')
    _check_values(cfg)
    return unread


def _check_values(cfg: Config) -> None:
    """Refuse values that are taken for another one, and values with which a run loses something or doesn't end."""
    interval = ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('interval')
    if interval == 0:
        raise UserError('default_hooks.checkpoint.interval must be an integer of at least 1, or -1 for no checkpoints, '
                        'got 0')
    name = (cfg.get('visualizer') or {}).get('name', 'visualizer')
    if not isinstance(name, str):
        raise UserError(f'visualizer.name must be a text, got {name!r}')
    for backend in (cfg.get('visualizer') or {}).get('vis_backends') or ():
        packages = PACKAGES.get(type_name(backend), ())
        if packages and not any(map(find_spec, packages)):
            raise UserError(f'visualizer.vis_backends: {type_name(backend)} needs the package {packages[0]}, which '
                            f'isn\'t installed; pip install {packages[0]}, or leave that backend out')
    sampler = (cfg.get('train_dataloader') or {}).get('sampler') or {}
    if type_name(sampler) in ENDLESS and (cfg.get('train_cfg') or {}).get('by_epoch', 'max_epochs' in (
            cfg.get('train_cfg') or {})):
        raise UserError(f'train_dataloader.sampler.type={type_name(sampler)!r}: an epoch would have no end; take '
                        "DefaultSampler, or train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=...)")
    _check_coders(cfg)
    for section in ('model', 'optim_wrapper', 'default_hooks', 'custom_hooks', 'train_dataloader', 'val_dataloader',
                    'env_cfg', 'auto_scale_lr'):
        for place in places_in(cfg, section):
            value = at(cfg, place)
            for name, allowed in CHOICES.items() if section == 'model' else ():
                if '.'.join(place).endswith(f'.{name}') and isinstance(value, str) and value not in allowed:
                    raise UserError(f'{".".join(place)} must be one of {", ".join(allowed)}, got {value!r}')
            for setting, names in LOOKED_FOR.items():
                strict = setting == place[-2] and setting in NOTHING_ELSE and place[-1] != '_scope_'
                if setting in place[:-1] and place[-1] not in names and (strict or close(place[-1], names, CLOSE)):
                    raise UserError(f'{".".join(place)}: nobody reads it{meant(place[-1], names)}')
            if 'metainfo' not in place and isinstance(value, str) and value.lower() in ('true', 'false', 'yes', 'no'):
                raise UserError(f'{".".join(place)} must be True or False, got the text {value!r}')


def _check_coders(cfg: Config) -> None:
    """Refuse misspelt arguments of a model's box coders, assigners and the like, some of which take all that comes."""
    for place in places_in(cfg, 'model'):
        node = at(cfg, place)
        cls = find_class(TASK_UTILS, node.get('type')) if isinstance(node, Mapping) else None
        if cls is not None:
            check_arguments('.'.join(place), node, cls, CLOSE)


def _occurs(value: Any, inside: Any) -> bool:
    """Whether a value is, or is part of, another one; MMEngine gives inherited ones a ``_scope_``."""
    if isinstance(value, str) and isinstance(inside, str):
        return value in inside
    if isinstance(value, Mapping) and isinstance(inside, Mapping) and all(
            key in inside and _equal(value[key], inside[key]) for key in value if key != '_scope_'):
        return True
    children = inside.values() if isinstance(inside, Mapping) else inside if isinstance(inside, (list, tuple)) else ()
    if isinstance(value, (list, tuple)) and value and all(_occurs(one, inside) for one in value):
        return True
    return _equal(value, inside) or any(_occurs(value, child) for child in children)


def _equal(value: Any, other: Any) -> bool:
    """Whether two values are equal but for ``_scope_``."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        names = (value.keys() | other.keys()) - {'_scope_'}
        return all(name in value and name in other and _equal(value[name], other[name]) for name in names)
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(value) == len(other) and all(map(_equal, value, other))
    return type(value) is type(other) and value == other
