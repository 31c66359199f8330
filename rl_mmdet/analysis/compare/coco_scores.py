"""COCO average precision of dumped detections, and the matches it is computed from."""
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from math import isfinite
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

METRICS = ('bbox', 'segm')
MAX_DETECTIONS = (100, 300, 1000)  # per image and class; AP is at the first, AP50 and all others at the last


@dataclass(frozen=True)
class Scores:
    """Average precisions as MMDetection's ``CocoMetric`` defines them, from 0 to 1, unrounded.

    Args:
        ap: mean over classes and IoU thresholds 0.5, 0.55, ..., 0.95; None without any object.
        ap50, ap75: at IoU threshold 0.5 and 0.75.
        ap_small, ap_medium, ap_large: of objects below 32² pixels, up to 96² and above; None without such objects.
        images, objects: how many there are.
        notes: what a reader of the numbers should know.
    """
    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    images: int
    objects: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Matches:
    """All that COCO AP, of objects of any size and at most 100 detections per image and class, is computed from.

    The D detections are ordered by class, by image and by falling score, the T thresholds are 0.5, 0.55, ..., 0.95.

    Args:
        image: (D,) index of the detection's image, images being ordered by id.
        label: (D,) index of its class.
        score: (D,) its score.
        hit: (T, D) whether it is matched to an object.
        ignored: (T, D) whether it counts neither as right nor as wrong (matched to a crowd).
        objects: (images, classes) number of objects to be found.
    """
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


def score_detections(annotations: Path, detections: Path, metric: str,
                     classes: Sequence[str]) -> tuple[Scores, Matches]:
    """Score detections as MMDetection's ``CocoMetric`` does.

    Args:
        annotations: COCO json of the images, all of which count.
        detections: json list that ``CocoMetric(format_only=True, outfile_prefix=...)`` writes: entries with
            ``image_id``, ``category_id``, ``score`` and, in pixels, ``bbox`` (x, y, width, height) or ``segmentation``.
        metric: 'bbox' or 'segm'.
        classes: names of the classes to score; others are left out.

    Returns:
        The average precisions, and the matches behind AP.

    Raises:
        ValueError: for a class that the annotations don't have, or detections without masks where the metric is 'segm'.
    """
    with redirect_stdout(StringIO()):  # pycocotools prints
        coco = COCO(str(annotations))
        known = {category['name']: category['id'] for category in coco.dataset['categories']}
        if not known.keys() >= set(classes):
            raise ValueError(f'classes {[name for name in classes if name not in known]} are not among the categories '
                             f'of the annotations, which are {list(known)}')
        categories = {name: known[name] for name in classes}
        entries, notes = _read_detections(detections, metric)
        evaluation = _evaluate(coco, entries, metric, list(categories.values()))
    averages = [None if value < 0 else float(value) for value in evaluation.stats[:6]]  # pycocotools' -1 is no value
    matches = _matches(evaluation, categories)
    return Scores(*averages, len(matches.objects), int(matches.objects.sum()), notes), matches


def _read_detections(path: Path, metric: str) -> tuple[list[dict], tuple[str, ...]]:
    """The entries that can be scored, and notes about the others.

    A box that is not a number would be matched to any object: its IoU is below no threshold.
    """
    entries = json.loads(path.read_text())
    if metric == 'segm':
        if not all('segmentation' in entry for entry in entries):
            raise ValueError(f"metric 'segm' needs detections with a segmentation, {path} has some without")
        for entry in entries:
            entry.pop('bbox', None)  # else the box's area counts as the object's size
    finite = [entry for entry in entries if all(map(isfinite, (entry['score'], *entry.get('bbox', ()))))]
    notes = []
    if len(finite) < len(entries):
        notes.append(f'{len(entries) - len(finite)} of {len(entries)} detections left out: '
                     'their score or box is not finite')
    if not finite:
        notes.append('no detections: all AP are 0')
    return finite, tuple(notes)


def _evaluate(coco: COCO, entries: list[dict], metric: str, categories: list[int]) -> COCOeval:
    """The evaluation with all its results."""
    if entries:
        found = coco.loadRes(entries)
    else:  # which loadRes refuses
        found = COCO()
        found.dataset = dict(coco.dataset, annotations=[])
        found.createIndex()
    evaluation = COCOeval(coco, found, metric)
    evaluation.params.catIds = categories
    evaluation.params.imgIds = coco.getImgIds()
    evaluation.params.maxDets = list(MAX_DETECTIONS)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _matches(evaluation: COCOeval, categories: dict[str, int]) -> Matches:
    """What is behind AP, taken from pycocotools' results for each class and image."""
    params, limit = evaluation.params, MAX_DETECTIONS[0]
    images, thresholds = len(params.imgIds), len(params.iouThrs)
    objects = np.zeros((images, len(categories)), dtype=np.int64)
    found = [(np.zeros(0, dtype=np.int64),) * 2 + (np.zeros(0),) + (np.zeros((thresholds, 0), dtype=bool),) * 2]
    for label, category in enumerate(categories.values()):
        first = params.catIds.index(category) * len(params.areaRng) * images  # objects of any size come first
        for image, result in enumerate(evaluation.evalImgs[first:first + images]):
            if result is None:
                continue
            objects[image, label] = np.count_nonzero(result['gtIgnore'] == 0)
            score = np.array(result['dtScores'][:limit], dtype=float)
            found.append((np.full(len(score), image), np.full(len(score), label), score,
                          result['dtMatches'][:, :limit] != 0, result['dtIgnore'][:, :limit].astype(bool)))
    return Matches(*(np.concatenate(arrays, axis=-1) for arrays in zip(*found, strict=True)), objects)
