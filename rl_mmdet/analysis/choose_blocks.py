"""Which blocks of a trained backbone their neighbours explain best: the ``BestFit`` plan on a config's own data."""
import copy
import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, set_random_seed
from rich.table import Table
from torch import Tensor, nn

from ..engine import UserError, build_model, check_checkpoint, read_checkpoint
from ..engine.preflight import check_data, make_data
from ..models.backbones.replacement_mixin import replace_in_backbone_
from ..models.layouts import own_layout, state_dict_of, translates
from ..replacement import ReplacementReport
from ..replacement.plans import BestFit
from .blocks import backbone_cfg


def choose_blocks(
        cfg: Config, checkpoint: str, p: float, *, batches: int = 4, fusion: str | None = None,
        operator: str | None = None, allow_pickle: bool = False) -> tuple[ReplacementReport, dict[str, float]]:
    """Choose the blocks of ``cfg.model.backbone`` to replace, with the ``BestFit`` plan.

    Args:
        cfg: a detector's config, with or without replacement; fusion and operator are the replacement's, if any.
        checkpoint: trained weights of the unreplaced backbone, or of a detector with it.
        p: the fraction of the replaceable blocks to replace.
        batches: how many batches of the training set to measure on, augmented and normalised as in training.
        fusion, operator: a type's name or a JSON object, in place of the config's.
        allow_pickle: see :func:`~rl_mmdet.engine.read_checkpoint`.

    Returns:
        The report on the replaced backbone, and each block's output error.

    Raises:
        UserError: no backbone or training data in the config, weights that don't fit it, or a setting that
            the replacement refuses.
    """
    if batches < 1:
        raise UserError(f'--batches must be at least 1, got {batches}')
    given = dict(backbone_cfg(cfg))
    settings = dict(given.pop('replacement', None) or {})
    for key, text in dict(fusion=fusion, operator=operator).items():
        if text is not None:
            settings[key] = _type_settings(f'--{key}', text)
    backbone = build_model(Config(dict(model=given, default_scope=cfg.get('default_scope', 'mmdet'))))
    _load_(backbone, checkpoint, allow_pickle)
    inputs = calibration_batches(cfg, batches)
    try:
        plan = BestFit(p, inputs)
        report = replace_in_backbone_(backbone.to(get_device()), dict(settings, plan=plan))
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    return report, plan.errors


def calibration_batches(cfg: Config, count: int, seed: int = 0) -> list[Tensor]:
    """The first batches of ``cfg.train_dataloader`` as the backbone gets them, the same ones at every call.

    Raises:
        UserError: the config has no training data, or the data isn't there or gives no image batches.
    """
    if not cfg.get('train_dataloader'):
        raise UserError('config: it has no train_dataloader to take calibration batches from')
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    check_data(cfg, 'train')
    make_data(cfg, 'train')
    set_random_seed(seed)
    settings = {key: value for key, value in copy.deepcopy(cfg.train_dataloader).items() if key != 'prefetch_factor'}
    loader = Runner.build_dataloader(dict(settings, num_workers=0, persistent_workers=False), seed=seed)
    preprocessor = MODELS.build(cfg.model.get('data_preprocessor') or dict(type='DetDataPreprocessor'))
    inputs = [preprocessor(batch, True)['inputs'] for batch in islice(loader, count)]
    if not inputs:
        raise UserError('train_dataloader: it gives no batch')
    if not all(isinstance(batch, Tensor) and batch.ndim == 4 for batch in inputs):
        raise UserError('train_dataloader: its batches are no tensors (N, 3, H, W), which the backbone is to run on')
    return inputs


def error_table(report: ReplacementReport, errors: Mapping[str, float]) -> Table:
    """Every block, its output error, and whether it is chosen or why it can't be."""
    table = Table(title='output error of the blocks: 0 is reproduced by its neighbours, 1 is as if left out')
    for column in ('stage', 'block', 'kind', 'parameters', 'output error', 'choice'):
        table.add_column(column, justify='right' if column in ('block', 'parameters', 'output error') else 'left')
    last = None
    for row in report.rows:
        if last not in (None, row.chain):
            table.add_section()
        last = row.chain
        error = f'{errors[row.name]:.3f}' if row.name in errors else ''
        table.add_row(row.chain, str(row.index), row.kind, f'{row.parameters:,}', error,
                      '[bold]replace[/]' if row.replaced else f"can't be replaced: {row.reason}" if row.reason else '')
    return table


def _load_(backbone: nn.Module, path: str, allow_pickle: bool) -> None:
    """Load the backbone's weights; a UserError if they aren't all there."""
    loaded = read_checkpoint(path, allow_pickle)
    prefix = 'backbone' if state_dict_of(loaded, 'backbone') else ''
    check_checkpoint(backbone, path, prefix=prefix, allow_pickle=allow_pickle)
    tensors = state_dict_of(loaded, prefix, wrapped=translates(backbone))
    backbone.load_state_dict(own_layout(backbone, tensors) if translates(backbone) else tensors, strict=False)


def _type_settings(option: str, text: str) -> dict[str, Any]:
    """The settings that an option's text stands for: a type's name, or a JSON object."""
    if not text.lstrip().startswith('{'):
        return dict(type=text)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f'{option}: not a JSON object ({error}), for instance {option} '
                        '\'{"type": "NAME"}\'') from None
