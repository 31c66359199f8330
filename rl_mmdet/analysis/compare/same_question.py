"""Whether configs ask the same question: the same val set, evaluated by the same COCO metric."""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict

from ...engine import UserError
from ...engine.config import type_name
from .coco_scores import METRICS

OF_NO_MATTER = ('pipeline', 'backend_args', 'palette', 'lazy_init', 'serialize_data', '_scope_')
"""Settings of a val set or metric in which variants may differ."""


def check_same_question(cfgs: Mapping[str, Config]) -> None:
    """All configs are evaluated on the same images, by the same CocoMetric.

    Args:
        cfgs: by name, the baseline's first.

    Raises:
        UserError: the baseline's evaluation can't be compared, or another's differs; it names the first setting.
    """
    (_, base), *others = cfgs.items()
    evaluator = coco_evaluator(base)
    if not evaluator.get('ann_file'):
        raise UserError('val_evaluator.ann_file is missing: detections are compared against a COCO annotation file')
    if not metrics_of(base):
        raise UserError(f'val_evaluator.metric is {evaluator.get("metric")!r}; what can be compared: '
                        f'{", ".join(METRICS)}')
    if evaluator.get('iou_thrs') is not None:
        raise UserError('val_evaluator.iou_thrs: COCO AP is compared, over the thresholds 0.5 to 0.95; leave it out')
    for name, cfg in others:
        for title, first, second in (('metric', evaluator, coco_evaluator(cfg)),
                                     ('val set', base.val_dataloader.dataset, cfg.val_dataloader.dataset)):
            for key, old, new in differing(first, second, OF_NO_MATTER):
                raise UserError(f'{name} has another {title} than the baseline, so their AP can\'t be compared: {key} '
                                f'is {new!r}, the baseline\'s {old!r}')


def coco_evaluator(cfg: Config) -> ConfigDict:
    """The CocoMetric among the config's val evaluators.

    Raises:
        UserError: there is none, or several.
    """
    if cfg.get('val_dataloader') is None or cfg.get('val_evaluator') is None:
        raise UserError('val_dataloader and val_evaluator are needed: without a val set there is no AP to compare')
    evaluators = cfg.val_evaluator if isinstance(cfg.val_evaluator, (list, tuple)) else [cfg.val_evaluator]
    found = [each for each in evaluators if type_name(each) == 'CocoMetric']
    if not found:
        raise UserError(f'val_evaluator must be a CocoMetric, got {", ".join(str(e.get("type")) for e in evaluators)}')
    if len(found) > 1:
        raise UserError("val_evaluator has several CocoMetrics; give one, such as with metric=['bbox', 'segm']")
    return found[0]


def metrics_of(cfg: Config) -> list[str]:
    """``'bbox'``, ``'segm'``, both or none of them."""
    metric = coco_evaluator(cfg).get('metric', 'bbox')
    return [each for each in METRICS if each in ([metric] if isinstance(metric, str) else metric)]


def differing(one: Mapping[str, Any], other: Mapping[str, Any],
              ignore: Sequence[str] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Every setting in which two configs differ, by dotted key, with both values."""
    first, second = dict(_flat(one, ignore)), dict(_flat(other, ignore))
    for key in dict.fromkeys([*first, *second]):
        if first.get(key) != second.get(key):
            yield key, first.get(key), second.get(key)


def _flat(node: Any, ignore: Sequence[str], key: str = '') -> Iterator[tuple[str, Any]]:
    """Every setting's dotted key and value."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name not in ignore:
                value = type_name(value) if name == 'type' else value
                yield from _flat(value, ignore, f'{key}.{name}' if key else name)
    else:
        yield key, list(node) if isinstance(node, tuple) else node
