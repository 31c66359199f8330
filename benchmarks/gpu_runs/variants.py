"""The detectors and variants that are measured on a GPU, the most important first."""
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model
from torch import nn

from rl_mmdet.folding import fold_norm
from step_variants import MASK_R50, MASK_R101, RETINA_R50, SWIN_T, VIT_B, Case, Subject, backbone_of

GOALS = {'folded': (.85, .70), 'slim+fold': (.65, .50), 'every-8+fold': (.80, .70), 'recompute+fold': (.90, .55)}
"""The first case, the whole step against the plain baseline: time and peak memory."""
MAIN = ('baseline', *GOALS, 'skip+fold')
OTHERS = ('baseline', 'every-8', 'slim', 'skip', 'frozen', 'checkpoint', 'efficient', 'folded-alone')
PLAIN = ('baseline', 'every-8', 'recompute', 'slim', 'skip', 'checkpoint')
"""For models without BatchNorm."""
SLIM = ('baseline', 'slim', 'slim-kept', 'slim-coupled', 'skip')
"""What SlimBlock costs the host."""
FULL = (800, 1333)
CASES = (
    Case(MASK_R101, 'detector', FULL, 2, 'bf16', variants=MAIN),
    Case(RETINA_R50, 'detector', FULL, 2, 'bf16', variants=MAIN),
    Case(SWIN_T, 'detector', FULL, 2, 'bf16', variants=PLAIN),
    Case(VIT_B, 'detector', (1024, 1024), 2, 'bf16', variants=PLAIN),
    Case(MASK_R101, 'detector', FULL, 2, 'bf16', variants=OTHERS),
    Case(MASK_R101, 'detector', FULL, 8, 'bf16', variants=MAIN),
    Case(MASK_R50, 'detector', FULL, 2, 'bf16', variants=MAIN),
    Case(MASK_R101, 'detector', FULL, 2, 'bf16', variants=SLIM),
    Case(MASK_R101, 'detector', FULL, 2, 'bf16', channels_last=True, variants=MAIN),
    Case(MASK_R101, 'detector', FULL, 8, 'bf16', channels_last=True, variants=MAIN),
    Case(MASK_R101, 'detector', FULL, 2, 'fp16', variants=MAIN),
    Case(MASK_R101, 'detector', FULL, 2, 'bf16', variants=('baseline', 'compiled')),
)
"""The last may hang in the compiler, so it is left out where another part comes after it."""
TINY = 'configs/digits/faster-rcnn_r34_fpn_digits.py'
SMALL_CASES = (
    Case(MASK_R50, 'detector', (96, 96), 1, 'bf16', variants=(*MAIN, *OTHERS[1:])),
    Case(SWIN_T, 'detector', (96, 96), 1, 'bf16', variants=PLAIN[:2]),
    Case(TINY, 'detector', (96, 96), 1, 'fp16', variants=('baseline', 'slim')),
    Case(TINY, 'detector', (96, 96), 1, variants=('baseline', 'compiled')),
)


def cases_of(small: bool) -> tuple[Case, ...]:
    return SMALL_CASES if small else CASES


def build(case: Case, name: str, choice: dict, blocks: list[str], device: str, source: nn.Module | None) -> Subject:
    """A variant of step_variants.py, or one of three that exist only here."""
    known = {'efficient': 'baseline', 'compiled': 'baseline', 'folded-alone': 'folded'}.get(name, name)
    subject = Subject(case, known, choice, blocks, device, source)
    backbone = backbone_of(subject.step.model)
    if name == 'efficient':
        turn_on_efficient_conv_bn_eval_for_single_model(backbone)
    if name == 'compiled':
        backbone.forward = torch.compile(backbone.forward)
    return subject


def context_of(name: str) -> Any:
    """What a variant runs in: ``folded-alone`` folds every convolution by itself."""
    return patch.object(fold_norm, 'WEIGHTS', 0) if name == 'folded-alone' else nullcontext()
