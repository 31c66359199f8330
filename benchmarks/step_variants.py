"""Whose training step is measured: a model on synthetic images, with its blocks replaced, kept or folded in many ways.

Variants replace, freeze, checkpoint or leave out the same blocks; NAME+fold also folds BatchNorm in all others:

    baseline, folded   nothing replaced, without and with fold_norm=True
    skip               the blocks left out: the yardstick
    every-1, every-8   RL-v1, learning in every step (plain autograd) or in one of eight
    recompute          every-8 with recompute=True
    slim, slim-coupled SlimBlock, learning in one of eight steps, or in every step with its neighbours
    slim-kept          slim with recompute=False: its output is kept for backward, not made again
    frozen             the blocks kept, their parameters frozen
    checkpoint         the blocks kept, each run by torch.utils.checkpoint
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn
from torch.utils.checkpoint import checkpoint

import rl_mmdet  # noqa: F401
from rl_mmdet.engine import build_model
from rl_mmdet.engine.config import for_one_process
from training_step import TrainingStep, backbone_step, detector_step
from zoo.configs import ROOT as MMDET_CONFIGS
from zoo.configs import read_config, with_few_regions
from zoo.swap import rl_twin

ROOT = Path(__file__).resolve().parents[1]
FOLD = '+fold'
AMP = {'off': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
MASK_R50 = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
MASK_R101 = 'mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py'
RETINA_R50 = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
SWIN_T = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
VIT_B = 'configs/rl_vit/mask-rcnn_vit-b-mae_simple-fpn_16xb4-lsj-100e_coco.py'
REHEARSAL = 256
"""On images lower than so many pixels detectors look at few regions."""
Blocks = dict[str, list[int]]


@dataclass(frozen=True)
class Variant:
    """What is done to the chosen blocks: they are replaced, or kept and changed."""
    replacement: dict | None = None
    change: Callable[[list[nn.Module]], None] | None = None


def replaced(operator: str, **gradient: Any) -> Variant:
    return Variant(dict(operator=dict(type=operator), gradient=gradient))


def freeze(blocks: list[nn.Module]) -> None:
    for block in blocks:
        block.requires_grad_(False)


def checkpoint_all(blocks: list[nn.Module]) -> None:
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


VARIANTS = {
    'baseline': Variant(),
    'skip': replaced('Skip'),
    'every-1': replaced('FullBlock', every=1),
    'every-8': replaced('FullBlock', every=8),
    'recompute': replaced('FullBlock', every=8, recompute=True),
    'slim': replaced('SlimBlock', every=8),
    'slim-coupled': replaced('SlimBlock', mode='coupled'),
    'slim-kept': replaced('SlimBlock', every=8, recompute=False),
    'frozen': Variant(change=freeze),
    'checkpoint': Variant(change=checkpoint_all),
}


@dataclass(frozen=True)
class Case:
    """One table: what is trained, and how; ``part`` is ``'backbone'`` or ``'detector'``."""
    config: str
    part: str
    size: tuple[int, int]
    batch: int = 1
    amp: str = 'off'
    channels_last: bool = False
    variants: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = ['' if self.amp == 'off' else self.amp, 'channels_last' if self.channels_last else '']
        return ', '.join([f'{Path(self.config).stem}, {self.part}, {self.batch}×3×{"×".join(map(str, self.size))}',
                          *filter(None, how)])


def is_folded(name: str) -> bool:
    return name == 'folded' or name.endswith(FOLD)


def variant(name: str) -> Variant:
    """The variant of that name, whether folded or not."""
    return VARIANTS['baseline' if name == 'folded' else name.removesuffix(FOLD)]


def read_model(config: str) -> tuple[dict, str]:
    """The model of a config, with its plain backbone and nothing to be loaded; or why there is none."""
    path = MMDET_CONFIGS / config.removeprefix('mmdet::') if config.startswith('mmdet::') else Path(config)
    path = path if path.is_absolute() or path.exists() else ROOT / path
    found = read_config(str(path.resolve()))
    if found.model is None or 'backbone' not in found.model:
        return {}, found.reason or 'its model has no backbone'
    model = for_one_process(found.model)
    for setting in ('replacement', 'fold_norm'):
        model['backbone'].pop(setting, None)
    if model.get('data_preprocessor'):
        model['data_preprocessor']['batch_augments'] = None  # which would bring all images to one size
    return model, ''


def build(case: Case, name: str, plan: Mapping[str, Any]) -> nn.Module:
    """The backbone or detector of a variant; raises UserError for what the backbone can't have."""
    torch.manual_seed(0)
    model, _ = read_model(case.config)
    replacement, backbone = variant(name).replacement, model['backbone']
    if replacement or is_folded(name):
        backbone = rl_twin(backbone) | (dict(fold_norm=True) if is_folded(name) else {})
    if replacement:
        backbone = dict(backbone, replacement=dict(replacement, plan=plan))
    if case.size[0] < REHEARSAL:
        model = with_few_regions(model)
    model = backbone if case.part == 'backbone' else dict(model, backbone=backbone)
    built = build_model(Config(dict(model=model)))
    built.train()  # mmdet's own returns nothing
    return built


def backbone_of(model: nn.Module) -> nn.Module:
    return getattr(model, 'backbone', model)


def chosen_blocks(case: Case) -> tuple[Blocks, list[str]]:
    """The blocks that every variant is about, every second one: as a choice and by name in the backbone."""
    report = backbone_of(build(case, 'every-8', dict(type='EveryKth', k=2))).replacement_report
    return report.replaced, [row.name for row in report.rows if row.replaced]


def share_weights_(model: nn.Module, source: nn.Module) -> None:
    """Let the model's parameters lie where those of the same name in ``source`` do: nobody changes them."""
    theirs = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs:
            parameter.data = theirs[name].data


class Subject:
    """One variant of a case, ready to be measured."""

    def __init__(self, case: Case, name: str, choice: Blocks, blocks: list[str], device: str,
                 source: nn.Module | None) -> None:
        model = build(case, name, dict(type='Blocks', blocks=choice)).to(device)
        if case.channels_last:
            model.to(memory_format=torch.channels_last)
        if source is not None:
            share_weights_(model, source)
        kept = [backbone_of(model).get_submodule(block) for block in blocks]
        change = variant(name).change
        if change is not None:
            change(kept)
        make = backbone_step if case.part == 'backbone' else detector_step
        self.step: TrainingStep = make(model, case.size, case.batch, AMP[case.amp])
        self.checkpointed = kept if change is checkpoint_all else []
