"""A first pair of configs for a user's own COCO data: a baseline like one of MMDetection's, and its RL twin."""
import math
import os
import os.path as osp
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.config import Config

from ..models.backbones.rl_backbone import rl_type_of
from .config import (
    add_import_,
    add_rl_defaults_,
    for_one_process,
    load_config,
    nested_dicts,
    type_name,
    uses_replacement,
)
from .errors import UserError
from .files import check_new_file, write_text
from .preflight import build_model
from .preflight.annotations import INSTANCE_KEYS, VAL_KEYS, check_annotations, read_annotations
from .preflight.guard import find_class, named

EXAMPLE = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
STEPS, MOST_EPOCHS = 5000, 100
"""A training shorter than so many steps gets more epochs, but not more than that."""
LIGHT = dict(type='SlimBlock', width=0.25)
TO_FIT = dict(operator=LIGHT, fusion=dict(type='TransformFusion', rank=16), gradient=dict(every=1))
"""As in configs/_base_/rl_v2_pretrained.py."""
COUPLED = dict(gradient=dict(mode='coupled'))
"""What replaced blocks from scratch need, see docs/method.md."""


class NewConfigs(NamedTuple):
    """The files that :func:`write_new_configs` has written, and what the user should know about them."""
    baseline: str
    rl: str
    remarks: list[str]


class _Coco(NamedTuple):
    """What a config needs to know of a COCO annotation file and its images."""
    path: str
    classes: list[str]
    files: list[str]
    masks: bool
    folder: str


def write_new_configs(base: str, train: str, val: str, images: Sequence[str] = (), out: str = '.') -> NewConfigs:
    """Write ``<data>_baseline.py``, which inherits ``base``, and ``<data>_rl.py``, which inherits the first.

    The baseline has the data's classes, files and image folders, a learning rate for its batch size, and for small
    sets more epochs. The RL config has nothing but the replaced backbone and what its training needs.

    A base in MMEngine's new style is written out in full, as other configs can't inherit it.

    Args:
        base: config of a COCO detector, as :func:`load_config` takes it.
        train, val: COCO annotation files with the same categories.
        images: folder of the images, or one for each file; without it they are looked for around the files.
        out: folder for the configs.

    Raises:
        UserError: a file that isn't a COCO annotation file, categories that differ, images that aren't found, a base
            that can't be adapted, or configs that exist already. Nothing is written then.
    """
    if len(images) > 2:
        raise UserError(f'--images: one folder, or two (of the train and the val set), are allowed, got {len(images)}')
    folders = [*images, *images][-2:] or ['', '']
    data = [_read(train, folders[0], INSTANCE_KEYS), _read(val, folders[1], VAL_KEYS)]
    if data[0].classes != data[1].classes:
        raise UserError(f'--coco: both need the same categories in the same order; {train} has '
                        f'{data[0].classes}, {val} has {data[1].classes}')
    root = _common_folder([each for coco in data for each in (osp.dirname(coco.path), coco.folder)])
    name = re.sub(r'\W+', '-', osp.basename(osp.abspath(root))).strip('-') or 'data'
    files = [osp.normpath(osp.join(out, f'{name}_{kind}.py')) for kind in ('baseline', 'rl')]
    for file in files if osp.isdir(out) else ():  # another one is made
        check_new_file(file)
    cfg = load_config(base)
    _check_base(cfg, masks=all(coco.masks for coco in data))
    baseline = deepcopy(cfg)
    _set_data_(baseline, data, root)
    remarks, steps = _set_schedule_(baseline, len(data[0].files), base)
    rl = _replaced(baseline, steps)
    os.makedirs(out, exist_ok=True)
    first = base if '::' in base else osp.relpath(base, out)
    if not all(isinstance(node.get('type', ''), str) for node in nested_dicts(cfg._cfg_dict)):
        first, cfg = [], Config()  # MMEngine's new style, which can't be a base of these
    for file, parent, old, new in ((files[0], first, cfg, baseline), (files[1], osp.basename(files[0]), baseline, rl)):
        write_text(file, f'_base_ = {parent!r}\n{Config(_difference(old.to_dict(), new.to_dict())).pretty_text}')
    return NewConfigs(*files, remarks)


def _read(path: str, folder: str, keys: Sequence[str]) -> _Coco:
    """What is in an annotation file; a UserError if MMDetection can't read that, or its images aren't found."""
    with named('--coco'):
        content = read_annotations(path)
        check_annotations(path, content, None, keys)
    files = [image['file_name'] for image in content['images']]
    names = [category['name'] for category in content.get('categories') or []]
    objects = content.get('annotations') or []
    masks = any(each.get('segmentation') for each in objects)
    if not (files and objects and names) or len(set(names)) < len(names):
        raise UserError(f'--coco {path}: it has {len(files)} images, {len(objects)} annotations and the categories '
                        f'{names}; at least one of each is needed, and no name twice')
    return _Coco(path, names, files, masks, _image_folder(path, files[0], folder))


def _image_folder(annotations: str, image: str, folder: str) -> str:
    """The folder that the image is in: the given one, or one of those that people have near their annotations."""
    here, stem = osp.dirname(annotations), Path(annotations).stem.removeprefix('instances_')
    near = [osp.normpath(osp.join(here, *parts)) for parts in
            ((), ('images',), (stem,), ('..', 'images'), ('..', stem), ('..',), ('..', 'images', stem))]
    for found in [folder] if folder else near:
        if osp.isfile(osp.join(found, image)):
            return found
    raise UserError(f'--images{folder and " "}{folder}: {image}, the first image of {annotations}, isn\'t in '
                    f'{folder or "any of " + ", ".join(near)}; name the folder that file_name starts from')


def _common_folder(paths: Sequence[str]) -> str:
    """The innermost folder that all are in, with a slash at its end; relative if all of them are."""
    if any(map(osp.isabs, paths)):
        paths = [osp.abspath(path) for path in paths]
    return osp.join(osp.commonpath([osp.normpath(path) for path in paths]) or '.', '')


def _check_base(cfg: Config, masks: bool) -> None:
    """Raise a UserError unless the base is an ordinary detector that trains and tests on COCO data."""
    if uses_replacement(cfg):
        raise UserError('--base: it has a replacement already; give the config of an ordinary detector')
    for phase in ('train', 'val', 'test'):
        nodes, evaluator = _datasets(cfg, phase), cfg.get(f'{phase}_evaluator')
        if [type_name(node) for node in nodes] != ['CocoDataset']:
            raise UserError(f'--base: {phase}_dataloader must have one CocoDataset, got '
                            f'{[type_name(node) for node in nodes]}; take a config for COCO, such as {EXAMPLE}')
        if phase != 'train' and not (isinstance(evaluator, Mapping) and 'ann_file' in evaluator):
            raise UserError(f'--base: {phase}_evaluator must be one CocoMetric with an ann_file, as in {EXAMPLE}')
    if 'segm' in cfg.val_evaluator.get('metric', 'bbox') and not masks:
        raise UserError('--base: its detector learns masks, and the annotations have none (segmentation); take one '
                        f'for boxes, such as {EXAMPLE}')


def _datasets(cfg: Config, phase: str) -> list[Mapping[str, Any]]:
    """The datasets that read annotations, within others that wrap them or not."""
    return [node for node in nested_dicts(cfg.get(f'{phase}_dataloader') or {}) if 'ann_file' in node]


def _set_data_(cfg: Config, data: Sequence[_Coco], root: str) -> None:
    """Set files, folders and classes of the data, and the number of classes of all heads that have the base's."""
    (first,), classes = _datasets(cfg, 'train'), data[0].classes
    before = len((first.get('metainfo') or CocoDataset.METAINFO)['classes'])
    for node in nested_dicts(cfg.model):
        for key in ('num_classes', 'num_things_classes'):
            if node.get(key) == before:
                node[key] = len(classes)
        weights = node.get('class_weight')
        if isinstance(weights, Sequence) and len(weights) == before + 1:  # the last one is of what is no object
            node['class_weight'] = [*weights[:1] * len(classes), weights[-1]]
    cfg.data_root = root
    for phase, coco in zip(('train', 'val', 'test'), (*data, data[1]), strict=True):
        (dataset,), file = _datasets(cfg, phase), osp.relpath(coco.path, root)
        dataset.update(data_root=root, ann_file=file, metainfo=dict(classes=classes),
                       data_prefix=dict(img=osp.join(osp.relpath(coco.folder, root), '')))
        if phase != 'train':
            cfg[f'{phase}_evaluator'].ann_file = osp.join(root, file)


def _base_batch(cfg: Config, base: str) -> int | None:
    """Images of a step that the base's learning rate is for: 8xb32 in its name says 256; else what the config says.

    The name goes first: MMDetection's RTMDet inherits a number for another learning rate.
    """
    found = re.search(r'_(\d+)xb(\d+)[-_.]', osp.basename(base))
    return int(found[1]) * int(found[2]) if found else (cfg.get('auto_scale_lr') or {}).get('base_batch_size')


def _set_schedule_(cfg: Config, images: int, base: str) -> tuple[list[str], int | None]:
    """Scale the learning rate to the batch of one process, and give small sets more epochs.

    Returns:
        What to tell the user, and the number of steps, None if that stays the base's.
    """
    loader, optimizer = cfg.train_dataloader, cfg.optim_wrapper.optimizer
    loader.batch_size = batch = min(loader.get('batch_size', 1), images)
    remarks, base_batch = [], _base_batch(cfg, base)
    schedulers = cfg.get('param_scheduler') or []
    schedulers = [schedulers] if isinstance(schedulers, Mapping) else schedulers
    if base_batch:
        scale = batch / base_batch
        remarks.append(f'learning rate {optimizer.lr:g} for {base_batch} images a step is '
                       f'{optimizer.lr * scale:.6g} for {batch}; on several GPUs add --auto-scale-lr')
        for node, key in ((optimizer, 'lr'), *((each, 'eta_min') for each in schedulers if each.get('eta_min'))):
            node[key] = float(f'{node[key] * scale:.6g}')
        cfg.auto_scale_lr = dict(cfg.get('auto_scale_lr') or dict(enable=False), base_batch_size=batch)
    else:
        remarks.append(f'learning rate {optimizer.lr:g} and {batch} images a step are the base\'s')
    if 'max_epochs' not in cfg.train_cfg:
        remarks.append('the schedule is the base\'s, in iterations: see train_cfg.max_iters')
        return remarks, None
    epochs, each = cfg.train_cfg.max_epochs, math.ceil(images / batch)
    longer = max(1, min(math.ceil(STEPS / (each * epochs)), MOST_EPOCHS // epochs))
    steps = longer * epochs * each
    for node, keys in ((cfg.train_cfg, ('max_epochs', 'val_interval')), (cfg.default_hooks.checkpoint, ('interval',)),
                       *((each, ('begin', 'end', 'milestones', 'T_max', 'step_size')) for each in schedulers
                         if each.get('by_epoch', True))):
        for key in node.keys() & set(keys):
            node[key] = [value * longer for value in node[key]] if key == 'milestones' else node[key] * longer
    for each in schedulers:
        if not each.get('by_epoch', True) and each.get('end', 0) > steps // 10:
            each.end = steps // 10  # a warm-up for COCO would be most of it
    remarks.append(f'{images} images: {longer * epochs} epochs ({steps} steps), the base has {epochs}')
    return remarks, steps


def _replaced(baseline: Config, steps: int | None) -> Config:
    """The baseline with Replacement Learning: the first of the known recipes that its backbone takes."""
    backbone = baseline.model.backbone
    rl_type = rl_type_of(backbone.type, find_class(MODELS, backbone.type))
    recipes: list[dict[str, Any]] = [dict(COUPLED, operator=LIGHT), COUPLED]
    if type_name(backbone.get('init_cfg')) == 'Pretrained' or baseline.get('load_from'):
        recipes = [dict(TO_FIT, start=dict(type='FitOutputs', fade=min(1000, (steps or STEPS) // 2))), {}]
    folds: list[dict[str, Any]] = [dict(fold_norm=True), {}] if backbone.get('norm_eval') else [{}]
    build_model(Config(for_one_process(deepcopy(baseline)._cfg_dict)))  # what is wrong with the base itself
    for fold, settings, k in product(folds, recipes, (4, 2)):  # short stages have no 4th block
        cfg = deepcopy(baseline)
        add_import_(cfg)
        cfg.model.backbone.update(rl_type, replacement=dict(plan=dict(type='EveryKth', k=k), **settings), **fold)
        try:
            build_model(Config(for_one_process(cfg._cfg_dict)))
        except UserError as error:
            refused = error
        else:
            return add_rl_defaults_(cfg)
    raise UserError(f'--base: {refused}')


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What a config must say to become ``new`` if it inherits ``old``."""
    if set(old) - set(new):
        return dict(new, _delete_=True)
    return {key: _difference(old[key], value) if isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
            else value for key, value in new.items() if key not in old or value != old[key]}
