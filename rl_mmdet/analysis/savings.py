"""What Replacement Learning would save of a backbone's training step, before anything is trained."""
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..engine import UserError
from ..engine.config import for_one_process
from ..engine.preflight import build_model, nothing_global
from ..engine.preflight.guard import find_class
from ..models.backbones.replacement_mixin import ARGUMENTS
from ..models.backbones.rl_backbone import is_rl_backbone, rl_type_of
from ..replacement import set_step_
from ..replacement.flops import count_flops
from ..replacement.saved_bytes import saved_bytes
from .blocks import backbone_cfg
from .cost import mean_over_steps, ratios_to, seconds_in_turn, trainable_parameters

SIDE, WINDOWED = 64, 224
"""Side in pixels of the smallest image that is counted, and where there is attention: windows of patches divide it."""
PLAN = dict(type='EveryKth', k=2)


class StepCost(NamedTuple):
    """What a backbone's training step costs: parameters that learn, FLOPs, and bytes that are kept for backward."""
    trainable: float
    flops: float
    saved: float


def savings_table(cfg: Config) -> tuple[Table, list[str]]:
    """Tabulate what RL-v1, RL-v2 and ``fold_norm`` save of the backbone's training step.

    FLOPs and bytes are counted for small images. Both are linear in the number of pixels, and with attention, for which
    three sizes are counted, of degree 2: good to a few per cent where images are padded to windows. Nothing is timed.

    Args:
        cfg: a detector's config, with or without replacement; it stays as it is.

    Returns:
        The table, and for each of its rows how to write that into a config, or why it can't be had here.

    Raises:
        UserError: the config has no backbone, or one that can't be built.
    """
    size, batch = _images_of(cfg)
    table = Table(title=f'the backbone\'s training step, {batch} images of {size[0]}×{size[1]}',
                  caption='counted, not timed; in brackets: over the baseline\'s; kept: for backward')
    table.add_column('setting')
    for column in ('learns, M', 'GFLOPs', 'kept, MB'):
        table.add_column(column, justify='right')
    baseline, lines = None, []
    for name, settings in variants_of(cfg):
        try:
            cost = step_cost(cfg, settings, size, batch)
        except UserError as error:
            if baseline is None:
                raise
            lines.append(f'{name}: not here, {error}')
            continue
        baseline = baseline or cost
        table.add_row(name, *(_beside(own / unit, other / unit, digits) for own, other, unit, digits in zip(
            cost, baseline, (1e6, 1e9, 1e6), (2, 0, 0), strict=True)))
        if settings:
            lines.append(f'{name}: {_text(settings)}')
    return table, lines


def variants_of(cfg: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is compared, by name: the settings that a backbone gets. The plan is the config's, if it has one."""
    own = own_settings(cfg)
    plan = (own.get('replacement') or {}).get('plan') or PLAN
    fold, slim = dict(norm_eval=True, fold_norm=True), dict(plan=plan, operator=dict(type='SlimBlock'))
    variants = {
        'RL-v1': dict(replacement=dict(plan=plan)),
        'RL-v2, SlimBlock': dict(replacement=slim),
        'fold_norm': fold,
        'RL-v1, fold_norm': dict(replacement=dict(plan=plan), **fold),
        'RL-v1, recompute, fold_norm': dict(replacement=dict(plan=plan, gradient=dict(recompute=True)), **fold),
        'RL-v2, SlimBlock, fold_norm': dict(replacement=slim, **fold)}
    yield 'baseline', {}
    if own and own not in variants.values():
        yield 'this config', own
    yield from variants.items()


def own_settings(cfg: Config) -> dict[str, Any]:
    """What of Replacement Learning the config's backbone has."""
    given = Config(dict(backbone=backbone_cfg(cfg))).to_dict()['backbone']
    return {key: given[key] for key in ARGUMENTS if given.get(key)}


def step_cost(cfg: Config, settings: Mapping[str, Any], size: Sequence[int], batch: int) -> StepCost:
    """The cost of a training step of the config's backbone with other settings.

    Args:
        cfg: a detector's config.
        settings: what the backbone has of Replacement Learning.
        size: height and width of the images in pixels.
        batch: how many images.

    Raises:
        UserError: the backbone doesn't take the settings, or can't be run on such images.
    """
    with nothing_global():
        return _step_cost(_build(cfg, settings), size, batch)


def step_ratios(cfgs: Sequence[Config], size: Sequence[int], batch: int) -> list[float]:
    """How long training steps of the configs' backbones take on this machine, over the first one's.

    Arguments as in :func:`step_cost`. Steps are taken in turn in one process; the median of nine turns.
    """
    with nothing_global():
        steps = {number: _numbered(_build(cfg, own_settings(cfg)), torch.rand(batch, 3, *size))
                 for number, cfg in enumerate(cfgs)}
        ratios = ratios_to(seconds_in_turn(steps, rounds=9, per_round=1), 0)
    return [median(ratios[number]) for number in steps]


def _numbered(backbone: nn.Module, images: Tensor) -> Callable[[], None]:
    """A function that makes the training's next step whenever it is called."""
    numbers = count()
    backbone.train()

    def step() -> None:
        set_step_(backbone, next(numbers))
        _train(backbone, images)
    return step


def _train(backbone: nn.Module, images: Tensor) -> None:
    """A forward and a backward run of a backbone."""
    outputs = [out for out in tree_flatten(backbone(images))[0] if isinstance(out, Tensor) and out.requires_grad]
    torch.autograd.backward(outputs, [torch.zeros_like(out) for out in outputs])
    backbone.zero_grad()


def _step_cost(backbone: nn.Module, size: Sequence[int], batch: int) -> StepCost:
    """The cost of a backbone's training step."""
    backbone.train()
    attention = any(hasattr(module, 'num_heads') for module in backbone.modules())
    side = WINDOWED if attention else SIDE
    sizes = [(side, side), (2 * side, 2 * side), *([(side, 2 * side)] if attention else [])]
    try:
        counts = np.array([_counts(backbone, each) for each in sizes], dtype=float)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f'{type(backbone).__name__} can\'t be run alone: {error}') from error
    pixels = [height * width for height, width in sizes]
    fits = [np.polyfit(pixels, each, len(sizes) - 1) for each in counts.T]
    # What there is without pixels, of made weights for instance, is there once in a batch.
    flops, saved = (fit[-1] + batch * (np.polyval(fit, size[0] * size[1]) - fit[-1]) for fit in fits)
    return StepCost(trainable_parameters(backbone), flops, saved)


def _images_of(cfg: Config) -> tuple[tuple[int, int], int]:
    """Height and width in pixels of the padded images that the train pipeline gives at most, and how many a batch has.

    800×1344 and 1 where the config doesn't tell.
    """
    found: list[tuple[int, int]] = []
    dataset = (cfg.get('train_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in dataset and isinstance(dataset.get('dataset'), Mapping):
        dataset = dataset['dataset']
    for transform in dataset.get('pipeline') or []:
        for key in ('scale', 'scales', 'img_scale', 'crop_size'):
            value = transform.get(key)
            sizes = value if isinstance(value, list) and value and isinstance(value[0], (list, tuple)) else [value]
            sizes = [each for each in sizes if isinstance(each, (list, tuple)) and len(each) == 2
                     and all(isinstance(side, int) for side in each)]
            if sizes:
                width, height = max(sizes, key=lambda each: each[0] * each[1])
                found.append((height, width))
    height, width = found[-1] if found else (800, 1333)
    batch = (cfg.get('train_dataloader') or {}).get('batch_size', 1)
    return (-(-height // 32) * 32, -(-width // 32) * 32), batch


def _build(cfg: Config, settings: Mapping[str, Any]) -> nn.Module:
    """The config's backbone with other settings, with random weights."""
    given = for_one_process(Config(dict(backbone=backbone_cfg(cfg))).to_dict()['backbone'])
    given = {key: value for key, value in given.items() if key not in ARGUMENTS} | dict(init_cfg=None)
    kind = find_class(MODELS, given['type'])
    if settings and not is_rl_backbone(kind):
        given.update(rl_type_of(given['type'], kind))
    return build_model(Config(dict(model=given | copy.deepcopy(dict(settings)),
                                   default_scope=cfg.get('default_scope', 'mmdet'))))


def _counts(backbone: nn.Module, size: tuple[int, int]) -> tuple[float, int]:
    """FLOPs of a step on one image, the mean over steps, and bytes kept for backward."""
    image = torch.zeros(1, 3, *size)
    flops = mean_over_steps(backbone, lambda: count_flops(lambda: _train(backbone, image)))
    set_step_(backbone, 0)
    return flops, saved_bytes(backbone, lambda: backbone(image))


def _beside(own: float, base: float, digits: int) -> str:
    """A number, and in brackets what it is over the baseline's, where it is another one."""
    return f'{own:.{digits}f}' + (f' (×{own / base:.2f})' if own != base and base else '')


def _text(settings: Mapping[str, Any]) -> str:
    """Settings as one writes them in a config."""
    def written(value: Any) -> str:
        if isinstance(value, Mapping):
            items = sorted(value.items(), key=lambda item: item[0] != 'type')  # which MMEngine sorts in otherwise
            return f'dict({", ".join(f"{key}={written(each)}" for key, each in items)})'
        return repr(value)
    return ', '.join(f'{key}={written(value)}' for key, value in settings.items())
