"""How far the difference of two detectors' AP could be due to the choice of the val images."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .coco_scores import Matches

RECALLS = np.linspace(0, 1, 101)
LEVEL = 0.95
CHUNK_BYTES = 2 ** 22  # of one class at a time; more than fits the cache is slower


@dataclass(frozen=True, eq=False)
class Resampled:
    """AP of one run on B sets of images that are drawn from the val images with repetition.

    Args:
        precision: (1 + B,) AP from 0 to 1, on the val images as they are first; NaN where no object is drawn.
        objects: (images, classes) number of objects to be found in the val images.
        seed: of the draws.
    """
    precision: np.ndarray
    objects: np.ndarray
    seed: int


@dataclass(frozen=True)
class Interval:
    """A difference of AP and its confidence interval, all from -1 to 1.

    Args:
        difference: on the val images as they are.
        low: lower end of the interval.
        high: upper end of the interval.
        level: share of such intervals that should hold the true difference, from 0 to 1.
        resamples: number of resampled sets of images behind the interval.
    """
    difference: float
    low: float
    high: float
    level: float
    resamples: int


def average_precision(matches: Matches, counts: np.ndarray | None = None) -> np.ndarray:
    r"""COCO AP on sets of images that are drawn from the val images with repetition.

    .. math:: AP = \frac{1}{|C| T} \sum_{c \in C} \sum_{t=1}^T \frac{1}{101} \sum_{i=0}^{100}
              \max_{k:\ r_{ctk} \geq i / 100} p_{ctk}

    where :math:`p_{ctk}` and :math:`r_{ctk}` are precision and recall of the k highest scores, C are the classes with
    objects and T is the number of IoU thresholds, as in pycocotools' ``COCOeval.accumulate``. The repetitions of a
    detection share one place in the order of scores; pycocotools could only order them otherwise where two detections
    of one image and class have the same score.

    Args:
        matches: of all images.
        counts: (B, images) how often each image is drawn; None takes each image once.

    Returns:
        (B,) AP from 0 to 1, NaN where no object is drawn.

    Raises:
        ValueError: if ``counts`` has another number of images.
    """
    images = len(matches.objects)
    if counts is None:
        counts = np.ones((1, images), dtype=np.int32)
    if counts.ndim != 2 or counts.shape[1] != images:
        raise ValueError(f'counts must have shape (B, {images}), a column for each image, got {counts.shape}')
    drawn = np.ascontiguousarray(counts.T, dtype=np.int32)
    sums, classes = np.zeros(len(counts)), np.zeros(len(counts))
    for label, objects in enumerate(matches.objects.T):
        to_find = objects @ drawn
        sums += _class_precision(matches, label, drawn, np.maximum(to_find, 1))
        classes += to_find > 0
    return np.divide(sums, classes, out=np.full(len(counts), np.nan), where=classes > 0)


def resampled_precision(matches: Matches, resamples: int = 1000, seed: int = 0) -> Resampled:
    """AP of one run for :func:`paired_interval`: the same seed draws the same images for every run.

    Args:
        matches: of all images.
        resamples: number of sets of images to draw, each of as many images as there are.
        seed: of the draws.

    Raises:
        ValueError: if there is no object to find, or if ``resamples`` is below 1.
    """
    if not matches.objects.any():
        raise ValueError('the val images have no object to find, so there is no AP to compare')
    if resamples < 1:
        raise ValueError(f'resamples must be at least 1, got {resamples}')
    images = len(matches.objects)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    counts = np.vstack([np.ones((1, images), dtype=draws.dtype), draws])
    return Resampled(average_precision(matches, counts), matches.objects, seed)


def paired_interval(reference: Sequence[Resampled], other: Sequence[Resampled], level: float = LEVEL) -> Interval:
    r"""Percentile interval of the difference of mean AP over the runs of two detectors.

    .. math:: d(w) = \frac{1}{|O|} \sum_{m \in O} AP(m, w) - \frac{1}{|R|} \sum_{m \in R} AP(m, w), \qquad
              w_1, ..., w_B \sim \mathrm{Multinomial}(n, 1/n)

    over the n val images: the interval runs from the :math:`(1 - level) / 2` to the :math:`(1 + level) / 2` quantile
    of :math:`d(w_1), ..., d(w_B)` (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). All runs
    are scored on the same drawn images, so what makes images hard for both sides cancels. The runs are taken as given:
    how much AP varies between trainings is not part of the interval.

    Args:
        reference: AP of one detector, one per run m in R.
        other: AP of the detector compared with it, one per run m in O, on the same draws of the same images and
            classes. Draws without any object are left out.
        level: share of such intervals that should hold the true difference, between 0 and 1.

    Raises:
        ValueError: if a side has no runs, if images, classes or draws differ, or if ``level`` is out of range.
    """
    _check(reference, other, level)
    difference = (np.mean([run.precision for run in other], axis=0)
                  - np.mean([run.precision for run in reference], axis=0))
    low, high = np.nanquantile(difference[1:], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference[0]), float(low), float(high), level, len(difference) - 1)


def _check(reference: Sequence[Resampled], other: Sequence[Resampled], level: float) -> None:
    for name, runs in (('reference', reference), ('other', other)):
        if not runs:
            raise ValueError(f'{name} has no runs; give the AP of at least one')
    first = reference[0]
    for name, runs in (('reference', reference), ('other', other)):
        for index, run in enumerate(runs):
            if not np.array_equal(run.objects, first.objects):
                raise ValueError(f'{name}[{index}] is of other images or classes than reference[0] (objects to find: '
                                 f'{_summary(run.objects)} against {_summary(first.objects)}); score all runs on the '
                                 'same annotations and classes')
            if (run.seed, len(run.precision)) != (first.seed, len(first.precision)):
                raise ValueError(f'{name}[{index}] is of other draws than reference[0]; resample all runs alike')
    if not 0 < level < 1:
        raise ValueError(f'level must lie between 0 and 1, got {level}')


def _summary(objects: np.ndarray) -> str:
    return f'{objects.sum()} in {len(objects)} images and {objects.shape[1]} classes'


def _class_precision(matches: Matches, label: int, drawn: np.ndarray, to_find: np.ndarray) -> np.ndarray:
    """(B,) AP of one class, from the draws (images, B) and the number of objects to find (B,)."""
    own = np.flatnonzero(matches.label == label)
    own = own[np.argsort(-matches.score[own], kind='stable')]
    image, ignored = matches.image[own], matches.ignored[:, own]
    correct = matches.hit[:, own] & ~ignored
    columns = max(1, CHUNK_BYTES // (8 * max(1, len(own))))
    precision = np.zeros(drawn.shape[1])
    for start in range(0, len(precision), columns):
        part = slice(start, start + columns)
        weights = drawn[:, part][image]
        ranks = np.cumsum(weights, axis=0, dtype=np.int32)
        for right, left_out in zip(correct, ignored, strict=True):
            precision[part] += _interpolated_precision(weights, ranks, right, left_out, to_find[part])
    return precision / len(correct)


def _interpolated_precision(weights: np.ndarray, ranks: np.ndarray, right: np.ndarray, left_out: np.ndarray,
                            to_find: np.ndarray) -> np.ndarray:
    """(B,) mean of the highest precision from each of 101 recalls on, at one IoU threshold.

    Recall only rises and precision only peaks where a detection is right, so those are all that is looked at.

    Args:
        weights: (D, B) how often each detection is drawn, by falling score.
        ranks: (D, B) how many detections are drawn up to it.
        right: (D,) whether it is right.
        left_out: (D,) whether it is ignored.
        to_find: (B,) objects.
    """
    at = np.flatnonzero(right)
    found = np.cumsum(weights[at], axis=0, dtype=np.int32)
    counted = ranks[at]
    if left_out.any():
        skipped = np.flatnonzero(left_out)
        skips = np.cumsum(np.pad(weights[skipped], ((1, 0), (0, 0))), axis=0, dtype=np.int32)
        counted -= skips[np.searchsorted(skipped, at)]
    precision = found / np.maximum(counted, 1)
    highest = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    recalls = np.searchsorted(RECALLS, found / to_find, side='right')  # those that are reached
    return (highest * np.diff(recalls, axis=0, prepend=0)).sum(axis=0) / len(RECALLS)
