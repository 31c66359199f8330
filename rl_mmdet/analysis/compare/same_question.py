"""Whether configs ask the same question: the same val set, evaluated by the same COCO metric."""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict

from ...engine import UserError
from .coco_scores import METRICS

OF_NO_MATTER = ('pipeline', 'backend_args', 'palette', 'lazy_init', 'serialize_data', '_scope_')
"""Settings of a val set or metric in which variants may differ."""


def check_evaluation(cfg: Config) -> None:
    """The baseline's evaluation is one that can be compared.

    Raises:
        UserError: it has no val set or no CocoMetric with an annotation file and the usual thresholds.
    """
    evaluator = coco_evaluator(cfg)
    if not evaluator.get('ann_file'):
        raise UserError('val_evaluator.ann_file is missing: detections are compared against a COCO annotation file')
    if not metrics_of(cfg):
        raise UserError(f'val_evaluator.metric is {evaluator.get("metric")!r}; what can be compared: '
                        f'{", ".join(METRICS)}')
    if evaluator.get('iou_thrs') is not None:
        raise UserError('val_evaluator.iou_thrs: COCO AP is compared, over the thresholds 0.5 to 0.95; leave it out')


def check_same_question(base: Config, other: Config, name: str) -> None:
    """Both are evaluated on the same images, by the same metric.

    Raises:
        UserError: they aren't; it names the first setting that differs.
    """
    for title, part in (('val set', lambda cfg: dict(cfg.val_dataloader.dataset)),
                        ('metric', lambda cfg: dict(coco_evaluator(cfg)))):
        for key, own, others in differences(part(base), part(other), OF_NO_MATTER):
            raise UserError(f'{name} has another {title} than the baseline, so their AP can\'t be compared: {key} is '
                            f'{others!r}, the baseline\'s {own!r}')


def coco_evaluator(cfg: Config) -> ConfigDict:
    """The CocoMetric among the config's val evaluators.

    Raises:
        UserError: there is none.
    """
    if cfg.get('val_dataloader') is None or cfg.get('val_evaluator') is None:
        raise UserError('val_dataloader and val_evaluator are needed: without a val set there is no AP to compare')
    evaluators = cfg.val_evaluator if isinstance(cfg.val_evaluator, (list, tuple)) else [cfg.val_evaluator]
    found = [each for each in evaluators if each.get('type') in ('CocoMetric', 'mmdet.CocoMetric')]
    if not found:
        raise UserError(f'val_evaluator must be a CocoMetric, got {", ".join(str(e.get("type")) for e in evaluators)}')
    return found[0]


def metrics_of(cfg: Config) -> list[str]:
    """``'bbox'``, ``'segm'``, both or none of them."""
    metric = coco_evaluator(cfg).get('metric', 'bbox')
    return [each for each in METRICS if each in ([metric] if isinstance(metric, str) else metric)]


def differences(one: Mapping[str, Any], other: Mapping[str, Any],
                ignore: Sequence[str] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Every setting in which two configs differ, by dotted key, with both values."""
    first, second = dict(_flat(one, ignore)), dict(_flat(other, ignore))
    for key in dict.fromkeys([*first, *second]):
        if first.get(key) != second.get(key):
            yield key, first.get(key), second.get(key)


def _flat(node: Any, ignore: Sequence[str], key: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name not in ignore:
                yield from _flat(value, ignore, f'{key}.{name}' if key else name)
    else:
        yield key, list(node) if isinstance(node, tuple) else node
