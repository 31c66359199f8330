"""Drawing scenes of real handwritten digits with their COCO annotations.

The digits are scikit-learn's ``load_digits``: 1797 samples of 8x8 pixels, part of that package, so nothing is
downloaded.
"""
import math
from collections.abc import Sequence

import cv2
import numpy as np

SPLITS = ('train', 'val')
CLASSES = tuple('0123456789')

DRAWING_VERSION = 1  # raise it when the drawing changes: older files are then made again
_DIGITS = 3, 7  # fewest and most in a scene; one that finds no free place is left out
_SCALES = 20 / 128, 48 / 128  # smallest and largest side of a sample as drawn, by the image's shorter side
_MAX_OVERLAP = 0.1  # what two boxes share at most, by the smaller one; so it bounds their IoU
_CLUTTER = 0, 4  # fewest and most blobs and strokes behind the digits
_SAMPLE_SIDE = 8  # px, side of a load_digits sample
_MAX_ROTATION = 15.0  # degrees, either way
_ROOM = 1.25  # room a rotated digit needs, in multiples of its scale: cos 15° + sin 15° = 1.22
_INK_LEVEL = 0.45  # sample value (0..1) at which a stroke ends
_LABEL_ALPHA = 0.5  # opacity from which a pixel counts as ink in the labels
_MAX_HIDDEN = 0.5  # share of an earlier digit's visible ink that a digit may hide
_CROWDING = 0.4  # share of the digits that are placed next to, or partly over, an earlier one
_PLACE_TRIES = 40


def digit_samples(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the handwritten samples that a split may use; train and val share none.

    Of each class, the first three quarters in ``load_digits`` order are train and the rest val, whatever the seed of
    the scenes. The samples are "apparently grouped by authors" (scikit-learn, ``model_selection/tests/test_split.py``,
    issue 2372), so a shuffled split would show most hands in both; this one shows few.

    Returns:
        Indices into ``load_digits`` of shape (n,), ascending; images of shape (n, 8, 8), float32 in [0, 1]; labels of
        shape (n,).
    """
    from sklearn.datasets import load_digits  # here: it takes a second, and a finished dataset doesn't need it

    digits = load_digits()
    chosen = []
    for label in range(len(CLASSES)):
        of_class = np.flatnonzero(digits.target == label)
        cut = round(0.75 * len(of_class))
        chosen.append(of_class[:cut] if split == 'train' else of_class[cut:])
    indices = np.sort(np.concatenate(chosen))
    return indices, digits.images[indices].astype(np.float32) / 16, digits.target[indices]


def draw_scene(image_size: tuple[int, int], seed: int, split: str, index: int, samples: np.ndarray, labels: np.ndarray,
               ) -> tuple[np.ndarray, list[dict]]:
    """Draw one scene; it depends on nothing but the arguments.

    Args:
        image_size: (width, height) in px.
        seed: Seed of the scenes. The samples of a split do not depend on it.
        split: 'train' or 'val'.
        index: Number of the image in the split.
        samples, labels: The split's handwriting, see :func:`digit_samples`.

    Returns:
        The RGB image, uint8 of shape (height, width, 3), and its COCO annotations without ids. A box encloses exactly
        the visible ink of its digit, which lies wholly inside the image.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scales = [min(image_size) * share for share in _SCALES]
    canvas = _background(rng, image_size)
    _add_clutter(rng, canvas, int(rng.integers(*_CLUTTER, endpoint=True)))
    owner = np.zeros(canvas.shape[:2], np.int32)  # ink on top: 0 nobody's, k the k-th digit's
    boxes, drawn = [], []
    for _ in range(rng.integers(*_DIGITS, endpoint=True)):
        chosen = rng.integers(len(samples))
        alpha = _ink(rng, samples[chosen], scales)
        box = _find_place(rng, owner, alpha, boxes)
        if box is None:
            continue
        boxes.append(box)
        drawn.append(int(labels[chosen]))
        _paint(rng, canvas[_region(box)], alpha)
        owner[_region(box)][alpha >= _LABEL_ALPHA] = len(boxes)
    annotations = [_annotation(owner == k, label) for k, label in enumerate(drawn, start=1)]
    return _add_noise(rng, canvas), annotations


def _background(rng: np.random.Generator, image_size: tuple[int, int]) -> np.ndarray:
    """A base colour with slow, coloured variation."""
    base = rng.uniform(40, 215, size=3)
    coarse = base + rng.uniform(-30, 30, size=(5, 5, 1)) + rng.uniform(-12, 12, size=(5, 5, 3))
    coarse = np.clip(coarse, 0, 255).astype(np.uint8)
    smooth = cv2.resize(coarse, (20, 20), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(smooth, image_size, interpolation=cv2.INTER_LINEAR)


def _add_clutter(rng: np.random.Generator, canvas: np.ndarray, pieces: int) -> None:
    """Draw filled blobs and long bent strokes: things with edges that are no digits."""
    size = np.array([canvas.shape[1], canvas.shape[0]])
    for _ in range(pieces):
        start = rng.integers(0, size)
        here = canvas[start[1], start[0]].astype(np.float64)
        contrast = rng.choice((-1, 1)) * rng.uniform(15, 60)
        color = np.clip(here + contrast + rng.uniform(-25, 25, size=3), 0, 255).tolist()
        if rng.random() < 0.5:
            axes = rng.integers(3, 3 + size.min() // 8, size=2).tolist()
            angle = rng.uniform(0, 180)
            cv2.ellipse(canvas, start.tolist(), axes, angle, 0, 360, color, cv2.FILLED, cv2.LINE_AA)
        else:
            turns = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.uniform(-1.2, 1.2, size=4))
            directions = np.stack([np.cos(turns), np.sin(turns)], axis=1)
            steps = rng.uniform(0.15, 0.35) * size * directions
            points = np.vstack([start, start + np.cumsum(steps, axis=0)]).astype(np.int32)
            cv2.polylines(canvas, [points], False, color, int(rng.integers(1, 4)), cv2.LINE_AA)


def _ink(rng: np.random.Generator, sample: np.ndarray, scales: Sequence[float]) -> np.ndarray:
    """Enlarge and rotate a sample into an antialiased opacity map, cut to its ink.

    The 8x8 values are interpolated (bicubic) and then steepened around the ink level, so that an edge is about 1.5 px
    wide at every scale. Returns the opacity in [0, 1], float32 of shape (h, w).
    """
    scale = math.exp(rng.uniform(*np.log(scales)))
    zoom = scale / _SAMPLE_SIDE
    side = math.ceil(scale * _ROOM)
    middle = (_SAMPLE_SIDE - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), rng.uniform(-_MAX_ROTATION, _MAX_ROTATION), zoom)
    matrix[:, 2] += (side - 1) / 2 - middle
    ink = cv2.warpAffine(sample, matrix, (side, side), flags=cv2.INTER_CUBIC)
    alpha = np.clip((ink - _INK_LEVEL) * zoom / 1.5 + 0.5, 0, 1)
    rows, columns = np.nonzero(alpha > 0.1)
    return alpha[rows.min():rows.max() + 1, columns.min():columns.max() + 1]


def _find_place(rng: np.random.Generator, owner: np.ndarray, alpha: np.ndarray, boxes: list[tuple],
                ) -> tuple[int, int, int, int] | None:
    """A box (x, y, w, h) that keeps the overlap cap and leaves enough of the earlier digits visible, or None."""
    height, width = alpha.shape
    ink = alpha >= _LABEL_ALPHA
    left, top, right, bottom = 0, 0, owner.shape[1] - width, owner.shape[0] - height
    if boxes and rng.random() < _CROWDING:
        x, y, w, h = boxes[rng.integers(len(boxes))]
        left, right = max(left, x - width), min(right, x + w)
        top, bottom = max(top, y - height), min(bottom, y + h)
    for _ in range(_PLACE_TRIES):
        x = int(rng.integers(left, right, endpoint=True))
        y = int(rng.integers(top, bottom, endpoint=True))
        box = (x, y, width, height)
        if any(_overlap(box, other) > _MAX_OVERLAP for other in boxes):
            continue
        beneath = owner[_region(box)][ink]
        if all(np.count_nonzero(beneath == k) <= _MAX_HIDDEN * np.count_nonzero(owner == k)
               for k in np.unique(beneath[beneath > 0])):
            return box
    return None


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over the smaller box: never below the IoU, and 1 if one box holds the other."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height) / min(a[2] * a[3], b[2] * b[3])


def _region(box: tuple[int, int, int, int]) -> tuple[slice, slice]:
    """The rows and columns of a box."""
    x, y, width, height = box
    return slice(y, y + height), slice(x, x + width)


def _paint(rng: np.random.Generator, region: np.ndarray, alpha: np.ndarray) -> None:
    """Blend the digit into a region of the canvas, in place, brighter or darker than its ground."""
    beneath = region.reshape(-1, 3).mean(axis=0)
    contrast = rng.uniform(60, 140) * (1 if beneath.mean() < 128 else -1)
    tint = rng.uniform(-45, 45, size=3)
    color = np.clip(beneath + contrast + tint - tint.mean(), 0, 255)
    weight = alpha[..., None]
    region[:] = np.rint(region * (1 - weight) + color.astype(np.float32) * weight)


def _add_noise(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Add grey noise to every pixel, ink included, as a camera would."""
    strength = int(rng.integers(2, 8))
    noise = rng.integers(-strength, strength, canvas.shape[:2], dtype=np.int8, endpoint=True)
    return cv2.add(canvas, cv2.merge([noise] * 3), dtype=cv2.CV_8U)


def _annotation(visible: np.ndarray, label: int) -> dict:
    """COCO annotation of a mask: the tight box, the number of ink pixels, the outlines."""
    x, y, width, height = cv2.boundingRect(visible.astype(np.uint8))
    ink = visible[y:y + height, x:x + width]
    return {'category_id': label + 1, 'bbox': [x, y, width, height], 'area': int(np.count_nonzero(ink)), 'iscrowd': 0,
            'segmentation': _outlines(ink, x, y)}


def _outlines(ink: np.ndarray, x: int, y: int) -> list[list[float]]:
    """Outer contours of the ink as COCO polygons, half-pixel exact; holes (0, 6, 8, 9) are filled.

    OpenCV puts contours through pixel centres, which would thin the strokes by a pixel; on the doubled mask it is half
    of one.
    """
    doubled = ink.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for contour in contours:
        simple = cv2.approxPolyDP(contour, 1, True)
        points = (simple if len(simple) >= 3 else contour)[:, 0]
        polygons.append(((points + 0.5) / 2 + (x, y)).ravel().tolist())
    return polygons
