"""The val images on which a variant and the baseline disagree most, drawn side by side."""
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from mmengine.dataset import BaseDataset

from ..picture import Boxes, Panel, side_by_side
from .coco_scores import Matches
from .comparison import Comparison, Run, val_dataset
from .contents import Contents
from .runs import matches_of

SCORE = 0.3
"""Detections above this score are looked at."""


@dataclass(frozen=True)
class Disagreement:
    """An image on which a variant does much better or worse than the baseline.

    Args:
        image: its index, images being ordered by id.
        variant: name.
        baseline_quality, variant_quality: see :func:`image_quality`.
    """
    image: int
    variant: str
    baseline_quality: float
    variant_quality: float


def image_quality(matches: Matches) -> np.ndarray:
    r"""How good the detections with a score above 0.3 are on each image.

    .. math:: F_1 = \frac{1}{T} \sum_{t=1}^T \frac{2 h_t}{d_t + n}

    where h are the detections that hit an object at IoU threshold t, d those that count there (ones matched to a crowd
    don't), and n the objects. It is 1 where there is nothing to find and nothing is found.

    Returns:
        (images,) from 0 to 1.
    """
    objects = matches.objects.sum(1)
    shown = matches.score > SCORE
    image = matches.image[shown]
    total = np.zeros(len(objects))
    for hit, ignored in zip(matches.hit[:, shown], matches.ignored[:, shown], strict=True):
        right = np.bincount(image[hit & ~ignored], minlength=len(objects))
        both = np.bincount(image[~ignored], minlength=len(objects)) + objects
        total += np.where(both == 0, 1., 2 * right / np.maximum(both, 1))
    return total / len(matches.hit)


def largest_disagreements(pairs: Mapping[str, tuple[Matches, Matches]], count: int = 6) -> list[Disagreement]:
    """The images with the largest difference of quality between the baseline and any variant, the largest first.

    Of images with the same difference the first ones are taken, of variants the first one; images without any
    difference are left out.

    Args:
        pairs: by variant, matches of the baseline and of the variant with the same seed.
        count: most images to take.
    """
    if not pairs:
        return []
    names = list(pairs)
    qualities = np.array([[image_quality(matches) for matches in pair] for pair in pairs.values()])
    differences = np.abs(qualities[:, 1] - qualities[:, 0]).round(9)  # equal fractions shall be equal
    most, largest = differences.argmax(0), differences.max(0)
    chosen = [int(image) for image in np.argsort(-largest, kind='stable')[:count] if largest[image] > 0]
    return [Disagreement(image, names[most[image]], *qualities[most[image], :, image].tolist()) for image in chosen]


def disagreements(comparison: Comparison, contents: Contents, count: int = 6) -> Figure | None:
    """Draw ground truth, the baseline's detections, and those of the variant that differs most.

    Each variant is compared for the lowest seed that both it and the baseline have finished.

    Args:
        comparison: whose detections.
        contents: which of its trainings are finished.
        count: most images to draw.

    Returns:
        The figure, a row for each image; None without any disagreement, or if image files are missing.
    """
    runs = _comparable_runs(comparison, contents)
    metric = contents.metrics[0]
    found = largest_disagreements(
        {name: (matches_of(one, metric), matches_of(other, metric)) for name, (one, other) in runs.items()}, count)
    folder = _image_folder(comparison) if found and comparison.annotations().is_file() else None
    if folder is None:
        return None
    annotations = json.loads(comparison.annotations().read_text())
    images = sorted(annotations['images'], key=lambda image: image['id'])
    files = [folder / images[each.image]['file_name'] for each in found]
    if not all(file.is_file() for file in files):
        return None
    ids = [images[each.image]['id'] for each in found]
    names = {each['id']: each['name'] for each in annotations['categories'] if each['name'] in comparison.classes}
    truth = _boxes([each for each in annotations['annotations'] if not each.get('iscrowd')], ids, names)
    detected = {run: _boxes(json.loads((run.folder / 'detections.bbox.json').read_text()), ids, names)
                for run in {run for each in found for run in runs[each.variant]}}
    rows = []
    for each, image in zip(found, ids, strict=True):
        one, other = runs[each.variant]
        rows.append([Panel('ground truth', truth[image]),
                     Panel(f'{one.variant} (F1 {each.baseline_quality:.2f})', detected[one][image]),
                     Panel(f'{other.variant} (F1 {each.variant_quality:.2f})', detected[other][image])])
    return side_by_side([str(file) for file in files], rows)


def _comparable_runs(comparison: Comparison, contents: Contents) -> dict[str, tuple[Run, Run]]:
    """For each variant the baseline's run and its own, with the same seed."""
    finished = {(run.variant, run.seed) for run in contents.runs if run.status == 'finished'}
    runs = {(run.variant, run.seed): run for run in comparison.runs()}
    found: dict[str, tuple[Run, Run]] = {}
    for variant in contents.variants[1:]:
        both = [seed for name, seed in finished if name == variant.name and (comparison.baseline, seed) in finished]
        if both:
            found[variant.name] = runs[comparison.baseline, min(both)], runs[variant.name, min(both)]
    return found


def _image_folder(comparison: Comparison) -> Path | None:
    """Where the val images are; None if the dataset has them in several places."""
    dataset = val_dataset(comparison.config(comparison.baseline))
    if not isinstance(dataset, BaseDataset) or 'img' not in dataset.data_prefix:
        return None
    return Path(dataset.data_prefix['img'])


def _boxes(entries: list[dict[str, Any]], images: list[int], names: Mapping[int, str]) -> dict[int, Boxes]:
    """Boxes of annotations or detections by image id, those with a score above the threshold, the highest last."""
    found: dict[int, list] = {image: [] for image in images}
    for entry in sorted(entries, key=lambda entry: entry.get('score', 1.)):
        if entry['image_id'] in found and entry['category_id'] in names and entry.get('score', 1.) > SCORE:
            x, y, width, height = entry['bbox']
            box = np.array([x, y, x + width, y + height])
            found[entry['image_id']].append((box, names[entry['category_id']], entry.get('score')))
    return found
