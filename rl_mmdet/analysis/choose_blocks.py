"""Which blocks of a trained backbone their neighbours explain best: the ``BestFit`` plan on a config's own data."""
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, set_random_seed
from rich.table import Table
from torch import Tensor, nn

from ..engine import UserError, build_model, load_checkpoint_, read_checkpoint
from ..engine.config import without_workers
from ..engine.preflight import check_data, make_data
from ..models.backbones.replacement_mixin import replace_in_backbone_
from ..models.layouts import state_dict_of
from ..replacement import ReplacementReport
from ..replacement.flops import count_flops
from ..replacement.plans import BestFit
from .blocks import backbone_cfg, tabulate

LOST = 0.95
"""With more left unexplained than this, a block might as well be left out, which is 1."""


@dataclass(frozen=True)
class Trial:
    """What the operator would leave unexplained, and at what cost.

    Args:
        report: on the backbone with the chosen blocks replaced.
        errors: what each block's computing layer leaves unexplained after a fit, by the block's name.
        flops: of the replaced backbone's forward run over the baseline's.
    """
    report: ReplacementReport
    errors: dict[str, float]
    flops: float


def choose_blocks(cfg: Config, checkpoint: str, p: float, *, batches: int = 4, steps: int = 100,
                  ignore_keys: Sequence[str] = (), allow_pickle: bool = False) -> Trial:
    """Choose the blocks of ``cfg.model.backbone`` to replace, with the ``BestFit`` plan.

    Args:
        cfg: a detector's config, with or without replacement; fusion and operator are the replacement's, if any.
        checkpoint: trained weights of the unreplaced backbone, or of a detector with it.
        p: the fraction of the replaceable blocks to replace.
        batches: how many batches of the training set to fit and measure on, augmented and normalised as in training.
        steps: of the fit; 0 measures the start.
        ignore_keys, allow_pickle: see :func:`~rl_mmdet.engine.load_checkpoint_`.

    Raises:
        UserError: no backbone or training data in the config, weights that don't fit it, or a setting that
            the replacement refuses.
    """
    if batches < 1:
        raise UserError(f'--batches must be at least 1, got {batches}')
    given = dict(backbone_cfg(cfg))
    settings = dict(given.pop('replacement', None) or {})
    settings.pop('start', None)  # this fit stands for it
    backbone = build_model(Config(dict(model=given, default_scope=cfg.get('default_scope', 'mmdet'))))
    prefix = 'backbone' if state_dict_of(read_checkpoint(checkpoint, allow_pickle), 'backbone') else ''
    load_checkpoint_(backbone, checkpoint, prefix=prefix, ignore=ignore_keys, allow_pickle=allow_pickle)
    inputs = calibration_batches(cfg, batches)
    backbone.to(get_device())
    baseline = _forward_flops(backbone, inputs[0][:1])
    try:
        plan = BestFit(p, inputs, steps)
        report = replace_in_backbone_(backbone, dict(settings, plan=plan))
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    return Trial(report, plan.errors, _forward_flops(backbone, inputs[0][:1]) / baseline)


@torch.no_grad()
def _forward_flops(backbone: nn.Module, image: Tensor) -> int:
    backbone.eval()
    image = image.to(next(backbone.parameters()).device)
    return count_flops(lambda: backbone(image))


def calibration_batches(cfg: Config, count: int) -> list[Tensor]:
    """The first batches of ``cfg.train_dataloader`` as the backbone gets them, the same ones at every call.

    Raises:
        UserError: the config has no training data, or the data isn't there or gives no image batches.
    """
    if not cfg.get('train_dataloader'):
        raise UserError('config: it has no train_dataloader to take calibration batches from')
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    check_data(cfg, 'train')
    make_data(cfg, 'train')
    set_random_seed(0)
    loader = Runner.build_dataloader(without_workers(cfg.train_dataloader), seed=0)
    preprocessor = MODELS.build(cfg.model.get('data_preprocessor') or dict(type='mmdet.DetDataPreprocessor'))
    inputs = [preprocessor(batch, True)['inputs'] for batch in islice(loader, count)]
    if not inputs:
        raise UserError('train_dataloader: it gives no batch')
    if not all(isinstance(batch, Tensor) and batch.ndim == 4 for batch in inputs):
        raise UserError('train_dataloader: its batches are no tensors (N, 3, H, W), which the backbone is to run on')
    return inputs


def error_table(trial: Trial) -> Table:
    """Every block, what is left unexplained of it, and whether the plan chooses it."""
    return tabulate(trial.report.rows, 'what is left unexplained of the blocks: 0 is reproduced, 1 is as if left out',
                    errors=trial.errors)


def cost_line(trial: Trial) -> str:
    """What the operator costs in the place of the chosen blocks."""
    return (f'{trial.report.settings["operator"]}: {sum(map(len, trial.report.replaced.values()))} blocks of '
            f'{trial.report.removed_parameters:,} parameters replaced by layers that learn {trial.report.learnable:,}; '
            f'forward FLOPs of the backbone ×{trial.flops:.2f}')


def warning_lines(trial: Trial) -> list[str]:
    """The chosen blocks that the operator keeps no better than leaving them out; nothing if all is well."""
    lost = [f'{row.name} ({trial.errors[row.name]:.2f})' for row in trial.report.rows
            if row.replaced and trial.errors[row.name] > LOST]
    if not lost:
        return []
    fitting = ' '.join(f'model.backbone.replacement.{setting}' for setting in (
        'operator.type=SlimBlock', 'operator.width=0.25', 'fusion.type=TransformFusion', 'fusion.rank=16',
        'fusion.adapt=True'))
    return [f'warning: {trial.report.settings["operator"]} is no better than leaving the block out in the place of '
            f'{", ".join(lost)}: from these weights, that costs AP. Try more --steps, a smaller --p, or what can be '
            f'fitted: --cfg-options {fitting}']
