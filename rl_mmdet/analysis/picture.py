"""Ground truth and several models' detections side by side."""
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

Boxes = Sequence[tuple[np.ndarray, str, float | None]]
"""For each object: box as (x1, y1, x2, y2) in pixels, class name, score (None for ground truth)."""
COLOURS = ('#2ca02c', '#1f77b4', '#d62728', '#9467bd')
LABEL = 0.06
"""Height of a label, as a part of the image's."""


@dataclass(frozen=True)
class Panel:
    """One image with boxes of one source on it, under a title."""
    title: str
    boxes: Boxes


def side_by_side(images: Sequence[str], rows: Sequence[Sequence[Panel]]) -> Figure:
    """Draw one picture: a row per image, a column per source of boxes.

    Args:
        images: image files.
        rows: for each image its panels, as many in every row.
    """
    columns = len(rows[0])
    figure = Figure(figsize=(3.2 * columns, 3.3 * len(images)), layout='constrained')
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, (image, panels) in enumerate(zip(images, rows, strict=True)):
        pixels = cv2.cvtColor(cv2.imread(image), cv2.COLOR_BGR2RGB)
        for column, panel in enumerate(panels):
            _draw(axes[row][column], pixels, panel.boxes, COLOURS[column % len(COLOURS)])
            axes[row][column].set_title(panel.title, fontsize=10)
    return figure


def _draw(axes: Axes, pixels: np.ndarray, boxes: Boxes, colour: str) -> None:
    axes.imshow(pixels)
    axes.set_axis_off()
    for (x1, y1, x2, y2), label, score in boxes:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        text = label if score is None else f'{label} {score:.2f}'
        inside = y1 < LABEL * len(pixels)  # else it would be cut off
        axes.text(x1, y1 + 1 if inside else y1 - 1, text, fontsize=8, color='white', clip_on=True,
                  va='top' if inside else 'bottom',
                  bbox=dict(facecolor=colour, edgecolor='none', pad=0.8))
