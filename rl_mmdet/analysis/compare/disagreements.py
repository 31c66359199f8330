"""The val images on which a variant and the baseline disagree most, drawn side by side."""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.dataset import BaseDataset

from ...engine.files import read_record
from .coco_scores import Matches
from .comparison import Comparison, Run, val_dataset
from .contents import Contents
from .runs import matches_of

SCORE = 0.3
"""Detections above this score are looked at."""
COLOURS = ('#2ca02c', '#1f77b4', '#d62728')
"""Of the ground truth, the baseline and the variant."""
LABEL = 0.06
"""Height of a box's label as a fraction of the image's."""
Boxes = list[tuple[np.ndarray, str]]
"""For each object its box as (x1, y1, x2, y2) in pixels, and its label."""


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


def largest_disagreements(baseline: np.ndarray, variants: np.ndarray, count: int = 6) -> list[tuple[int, int]]:
    """The images with the largest difference of quality between the baseline and any variant, the largest first.

    Of images with the same difference the first ones are taken, of variants the first one; images without any
    difference are left out.

    Args:
        baseline: (variants, images) quality of the baseline with the seed that the variant has.
        variants: (variants, images) quality of each variant.
        count: most images to take.

    Returns:
        Indices of image and variant.
    """
    differences = np.abs(variants - baseline).round(9)  # equal fractions shall be equal
    largest = differences.max(0)
    return [(int(image), int(differences[:, image].argmax()))
            for image in np.argsort(-largest, kind='stable')[:count] if largest[image] > 0]


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
    pairs = _comparable_runs(comparison, contents)
    folder = _image_folder(comparison)
    if not pairs or folder is None or not comparison.annotations().is_file():
        return None
    metric = contents.metrics[0]
    known = {run: image_quality(matches_of(run, metric)) for run in {run for pair in pairs for run in pair}}
    chosen = largest_disagreements(*(np.array([known[pair[side]] for pair in pairs]) for side in (0, 1)), count)
    annotations = json.loads(comparison.annotations().read_text())
    images = sorted(annotations['images'], key=lambda image: image['id'])
    files = [folder / images[index]['file_name'] for index, _ in chosen]
    if not chosen or not all(file.is_file() for file in files):
        return None
    ids = [images[index]['id'] for index, _ in chosen]
    names = {each['id']: each['name'] for each in annotations['categories'] if each['name'] in comparison.classes}
    truth = _boxes([each for each in annotations['annotations'] if not each.get('iscrowd')], ids, names)
    found = {run: _boxes(read_record(run.folder / 'detections.bbox.json'), ids, names)
             for run in {run for _, variant in chosen for run in pairs[variant]}}
    figure = Figure(figsize=(9.6, 3.3 * len(chosen)), layout='constrained')
    for row, (index, variant), file, image in zip(figure.subplots(len(chosen), 3, squeeze=False), chosen, files, ids,
                                                  strict=True):
        titles = ['ground truth', *(f'{run.variant} (F1 {known[run][index]:.2f})' for run in pairs[variant])]
        boxes = [truth[image], *(found[run][image] for run in pairs[variant])]
        pixels = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        for axes, title, own, colour in zip(row, titles, boxes, COLOURS, strict=True):
            axes.set_title(title, fontsize=10)
            _draw(axes, pixels, own, colour)
    return figure


def _comparable_runs(comparison: Comparison, contents: Contents) -> list[tuple[Run, Run]]:
    """For each variant that can be compared the baseline's run and its own, with the same seed."""
    finished = {(run.variant, run.seed) for run in contents.runs if run.status == 'finished'}
    runs = {(run.variant, run.seed): run for run in comparison.runs()}
    found = []
    for variant in contents.variants[1:]:
        both = [seed for name, seed in finished if name == variant.name and (comparison.baseline, seed) in finished]
        if both:
            found.append((runs[comparison.baseline, min(both)], runs[variant.name, min(both)]))
    return found


def _image_folder(comparison: Comparison) -> Path | None:
    """Where the val images are; None if the dataset has them in several places."""
    dataset = val_dataset(comparison.config(comparison.baseline))
    if not isinstance(dataset, BaseDataset) or 'img' not in dataset.data_prefix:
        return None
    return Path(dataset.data_prefix['img'])


def _boxes(entries: list[dict[str, Any]], images: list[int], names: Mapping[int, str]) -> dict[int, Boxes]:
    """Boxes of annotations or detections by image id, those with a score above the threshold, the highest last."""
    found: dict[int, Boxes] = {image: [] for image in images}
    for entry in sorted(entries, key=lambda entry: entry.get('score', 1.)):
        if entry['image_id'] in found and entry['category_id'] in names and entry.get('score', 1.) > SCORE:
            x, y, width, height = entry['bbox']
            label = names[entry['category_id']] + (f' {entry["score"]:.2f}' if 'score' in entry else '')
            found[entry['image_id']].append((np.array([x, y, x + width, y + height]), label))
    return found


def _draw(axes: Axes, pixels: np.ndarray, boxes: Boxes, colour: str) -> None:
    axes.imshow(pixels)
    axes.set_axis_off()
    for (x1, y1, x2, y2), label in boxes:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        inside = y1 < LABEL * len(pixels)  # else it would be cut off
        axes.text(x1, y1 + 1 if inside else y1 - 1, label, fontsize=8, color='white', clip_on=True,
                  va='top' if inside else 'bottom', bbox=dict(facecolor=colour, edgecolor='none', pad=0.8))
