"""Ground truth and several models' detections side by side."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

Boxes = Sequence[tuple[np.ndarray, str, float | None]]
"""For each object: box as (x1, y1, x2, y2) in pixels, class name, score (None for ground truth)."""
COLOURS = ('#2ca02c', '#1f77b4', '#d62728', '#9467bd')


def save_side_by_side(path: Path, images: Sequence[str], columns: Mapping[str, Sequence[Boxes]]) -> None:
    """Save one picture: a row per image, a column per source of boxes.

    Args:
        path: PNG file to write.
        images: image files.
        columns: by title, the boxes in each image; the ground truth first.
    """
    figure = Figure(figsize=(3.2 * len(columns), 3.3 * len(images)), layout='constrained')
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for row, image in enumerate(images):
        pixels = cv2.cvtColor(cv2.imread(image), cv2.COLOR_BGR2RGB)
        for column, (title, boxes) in enumerate(columns.items()):
            _draw(axes[row][column], pixels, boxes[row], COLOURS[column % len(COLOURS)])
            if row == 0:
                axes[row][column].set_title(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _draw(axes: Axes, pixels: np.ndarray, boxes: Boxes, colour: str) -> None:
    axes.imshow(pixels)
    axes.set_axis_off()
    for (x1, y1, x2, y2), label, score in boxes:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        text = label if score is None else f'{label} {score:.2f}'
        axes.text(x1, y1 - 1, text, fontsize=8, color='white', va='bottom', clip_on=True,
                  bbox=dict(facecolor=colour, edgecolor='none', pad=0.8))
