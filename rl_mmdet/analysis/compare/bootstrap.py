"""How far the difference of two detectors' AP could be due to the choice of the val images."""
from collections.abc import Sequence

import numpy as np

from .coco_scores import Matches

RECALLS = np.linspace(0, 1, 101)
LEVEL = 0.95
CHUNK_BYTES = 2 ** 22  # of one class at a time; more than fits the cache is slower


def average_precision(matches: Matches, counts: np.ndarray) -> np.ndarray:
    r"""COCO AP on sets of images that are drawn from the val images with repetition.

    .. math:: AP = \frac{1}{|C| T} \sum_{c \in C} \sum_{t=1}^T \frac{1}{101} \sum_{i=0}^{100}
              \max_{k:\ r_{ctk} \geq i / 100} p_{ctk}

    where :math:`p_{ctk}` and :math:`r_{ctk}` are precision and recall of the k highest scores, C are the classes with
    objects and T is the number of IoU thresholds, as in pycocotools' ``COCOeval.accumulate``. The repetitions of a
    detection share one place in the order of scores; pycocotools could only order them otherwise where two detections
    of one image and class have the same score.

    Args:
        matches: of all images.
        counts: (B, images) how often each image is drawn.

    Returns:
        (B,) AP from 0 to 1, NaN where no object is drawn.
    """
    drawn = np.ascontiguousarray(counts.T, dtype=np.int32)
    sums, classes = np.zeros(len(counts)), np.zeros(len(counts))
    for label, objects in enumerate(matches.objects.T):
        to_find = objects @ drawn
        sums += _class_precision(matches, label, drawn, np.maximum(to_find, 1))
        classes += to_find > 0
    return np.divide(sums, classes, out=np.full(len(counts), np.nan), where=classes > 0)


def resampled_precision(matches: Matches, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """AP of one run for :func:`paired_interval`: the same seed draws the same images for every run.

    Args:
        matches: of all images.
        resamples: number of sets of images to draw, each of as many images as there are.
        seed: of the draws.

    Returns:
        (resamples,) AP from 0 to 1; NaN where no object is drawn.
    """
    images = len(matches.objects)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    return average_precision(matches, draws)


def paired_interval(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> tuple[float, float]:
    r"""Percentile interval of the difference of mean AP over the runs of two detectors.

    .. math:: d(w) = \frac{1}{|O|} \sum_{m \in O} AP(m, w) - \frac{1}{|R|} \sum_{m \in R} AP(m, w), \qquad
              w_1, ..., w_B \sim \mathrm{Multinomial}(n, 1/n)

    over the n val images: the interval holds 95 % of :math:`d(w_1), ..., d(w_B)`, from the 2.5 % to the 97.5 % quantile
    (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). All runs are scored on the same drawn
    images, so what makes images hard for both sides cancels. The runs are taken as given: how much AP varies between
    trainings is not part of the interval.

    Args:
        reference: for each run m in R its :func:`resampled_precision`.
        other: the same for the runs m in O, from the same images and the same seed.
    """
    difference = np.mean(other, axis=0) - np.mean(reference, axis=0)
    low, high = np.nanquantile(difference, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _class_precision(matches: Matches, label: int, drawn: np.ndarray, to_find: np.ndarray) -> np.ndarray:
    """(B,) AP of one class, from the draws (images, B) and the number of objects to find (B,)."""
    own = np.flatnonzero(matches.label == label)
    own = own[np.argsort(-matches.score[own], kind='stable')]
    image, counted = matches.image[own], ~matches.ignored[:, own]
    columns = max(1, CHUNK_BYTES // (8 * max(1, len(own))))
    precision = np.zeros(drawn.shape[1])
    for start in range(0, len(precision), columns):
        chunk = slice(start, start + columns)
        weights = drawn[:, chunk][image]
        ranks = np.cumsum(weights, axis=0, dtype=np.int32)
        for hit, counts in zip(matches.hit[:, own], counted, strict=True):
            own_ranks = ranks if counts.all() else np.cumsum(weights[counts], axis=0, dtype=np.int32)
            precision[chunk] += _interpolated_precision(weights[hit & counts], own_ranks[hit[counts]], to_find[chunk])
    return precision / len(counted)


def _interpolated_precision(weights: np.ndarray, ranks: np.ndarray, to_find: np.ndarray) -> np.ndarray:
    """(B,) mean of the highest precision from each of 101 recalls on, at one IoU threshold.

    Args:
        weights: (D, B) how often each right detection is drawn, by falling score. Others aren't needed: only where a
            detection is right recall rises and precision peaks.
        ranks: (D, B) how many detections, right or wrong, are drawn up to it.
        to_find: (B,) objects.
    """
    found = np.cumsum(weights, axis=0, dtype=np.int32)
    precision = found / np.maximum(ranks, 1)
    highest = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    recalls = np.searchsorted(RECALLS, found / to_find, side='right')  # those that are reached
    return (highest * np.diff(recalls, axis=0, prepend=0)).sum(axis=0) / len(RECALLS)
