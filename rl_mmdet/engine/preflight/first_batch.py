"""The first samples of a run, made small, and what its detector makes of them."""
import traceback
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from mmdet.models.roi_heads.mask_heads import FusedSemanticHead
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ..config import nested_dicts, type_name
from ..errors import UserError
from .data import Lengthened, SmallData
from .guard import ELSEWHERE, find_class, parameters_of, quiet, reason_of
from .model import pretrained_inits

SIDES = 224, 416, None
"""Of the images that the detector sees, in pixels; None for the run's own size. Small maps don't do for all heads."""
SAMPLERS = ('DefaultSampler', 'InfiniteSampler')
"""Those that need no more than a data set's length."""


def small_loader(cfg: Config, setting: str, small: SmallData, side: int | None = None) -> DataLoader:
    """The loader that ``cfg[setting]`` describes, on a few images, without workers' processes.

    Where it isn't known how to build the data set on a few images, it stands for one of 1000 without content.

    Args:
        cfg: may be changed.
        setting: such as ``train_dataloader``.
        small: makes the data sets small.
        side: resize images to it at the end of the pipeline.
    """
    settings = cfg[setting]
    dataset = settings.get('dataset')
    if not isinstance(dataset, Mapping):
        raise UserError(f'{setting}.dataset must be a dict, got {dataset!r}')
    known = small.small_(dataset, f'{setting}.dataset')
    option, value = ('serialize_data', False) if known else ('lazy_init', True)  # serialising takes 0.3 s
    for node in nested_dicts(dataset):
        cls = find_class(DATASETS, node.get('type'))
        if cls is not None and option in parameters_of(cls):
            node[option] = value
    if side is not None:
        _resize_last_(dataset, side)
    built = DATASETS.build(dataset)
    empty = known and len(built) == 0
    if empty and small.scale == 1:
        raise UserError(f'{setting}.dataset: no image of {", ".join(small.files)} is left; look at filter_cfg, '
                        'metainfo.classes and the file\'s annotations')
    if known and not empty:
        built[0]
        settings['dataset'] = Lengthened(built, small.scale)
    else:
        if type_name(settings.get('sampler')) not in SAMPLERS or settings.get('batch_sampler'):
            return DataLoader(range(1000))
        settings['dataset'] = range(1000)
    loader = Runner.build_dataloader(settings, seed=0)
    if len(loader) == 0:
        raise UserError(f'{setting}: {len(loader.dataset)} images give no batch of {settings.get("batch_size")} with '
                        'drop_last=True')
    return loader


def see(cfg: Config, phase: str, model: nn.Module, small: SmallData, own: Dataset) -> tuple[dict, Any] | None:
    """Show the detector two images of a phase; of several data sets in a row, two of the first and of the last.

    Args:
        cfg, phase, model, small: as in :func:`~.rehearsal.rehearse`.
        own: the phase's data set, in which images aren't resized for this.

    Returns:
        The batch, and the losses or the predictions; None if they can be had only where the run will be.

    Raises:
        UserError: the detector fails, with small images and with the run's own.
    """
    for side in SIDES:
        try:
            with quiet(), torch.no_grad():
                loader = small_loader(Config(deepcopy(cfg._cfg_dict)), f'{phase}_dataloader', small, side)
                several = isinstance(loader.dataset.dataset, ConcatDataset)  # semi-supervised detectors want all kinds
                batch = loader.collate_fn([loader.dataset[index] for index in (0, 1, *(-2, -1) * several)])
                if _is_unscaled(own[0]):  # but here a Resize more has set it
                    for sample in batch['data_samples']:
                        sample.pop('scale_factor', None)
                model.train(phase == 'train')
                inputs = model.data_preprocessor(batch, phase == 'train')
                return batch, model(**inputs, mode='loss' if phase == 'train' else 'predict')
        except Exception as error:  # detectors raise whatever they like
            if ELSEWHERE.search(str(error)):
                return None
            failed = error
    raise UserError(_why(failed, model)) from failed


def _is_unscaled(sample: Any) -> bool:
    """Whether a sample of one image says nothing of its scale, which most heads ask for in validation."""
    packed = sample.get('data_samples') if isinstance(sample, Mapping) else None
    return isinstance(packed, DetDataSample) and 'scale_factor' not in packed.metainfo


def initialise_(model: nn.Module) -> None:
    """Give all of a detector but its backbones, which take long, weights that training can begin with."""
    for parameter in model.parameters():  # some are only allocated so far
        parameter.data.nan_to_num_(0).clamp_(-1, 1)
    for name, _ in pretrained_inits(model):
        model.get_submodule(name).init_cfg = None
    for name, module in model.named_modules():
        if name.endswith('backbone'):
            module.init_weights = lambda: None
    model.init_weights()


def check_classes(model: nn.Module, loader: DataLoader, setting: str) -> None:
    """Refuse heads for another number of classes than the data set has."""
    metainfo = getattr(loader.dataset, 'metainfo', None) or {}
    classes = metainfo.get('classes')
    if not isinstance(classes, (list, tuple)) or 'thing_classes' in metainfo:
        return
    for name, module in model.named_modules():
        count = getattr(module, 'num_classes', len(classes))
        if count != len(classes) and name.split('.')[-1] in HEADS and not isinstance(module, FusedSemanticHead):
            raise UserError(f'model.{name}.num_classes={count}, but {setting}.dataset has {len(classes)} classes: '
                            f'{", ".join(classes[:5])}; make them equal')


def _resize_last_(node: Any, side: int) -> None:
    """Put a Resize in front of every PackDetInputs, in place."""
    if isinstance(node, list):
        for index in [index for index, one in enumerate(node) if isinstance(one, Mapping)
                      and type_name(one) == 'PackDetInputs'][::-1]:
            node.insert(index, dict(type='mmdet.Resize', scale=(side, side), keep_ratio=False))
    for child in node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ():
        _resize_last_(child, side)


def _why(error: Exception, model: nn.Module) -> str:
    """Why a detector failed: maps that its neck doesn't take, or the innermost module and its error."""
    for name, module in model.named_modules():
        wanted = given = getattr(getattr(module, 'neck', None), 'in_channels', None)
        if isinstance(wanted, (list, tuple)) and hasattr(module, 'backbone'):
            with suppress(Exception), torch.no_grad():  # it may be what fails
                given = [one.shape[1] for one in module.backbone(torch.zeros(2, 3, SIDES[0], SIDES[0]))]
            if list(wanted) != list(given):
                prefix = f'model.{name}.'.replace('..', '.')
                return (f'{prefix}neck.in_channels={list(wanted)}, but {prefix}backbone gives {len(given)} maps with '
                        f'{given} channels (out_indices={getattr(module.backbone, "out_indices", None)}); make them '
                        'equal')
    names = {id(module): name for name, module in model.named_modules()}
    inside = [names[id(frame.f_locals.get('self'))] for frame, _ in traceback.walk_tb(error.__traceback__)
              if id(frame.f_locals.get('self')) in names]
    return f'{".".join(["model", *inside[-1:]]).rstrip(".")}: {reason_of(error)}'


HEADS = ('bbox_head', 'mask_head', 'panoptic_head', 'panoptic_fusion_head')
