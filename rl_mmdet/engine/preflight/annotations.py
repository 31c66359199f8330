"""Annotation files in COCO's form: what MMDetection would stumble over, or leave out without a word."""
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError

IMAGE_KEYS = ('id', 'file_name', 'height', 'width')
CATEGORY_KEYS = ('id', 'name')
INSTANCE_KEYS = ('id', 'image_id', 'category_id', 'bbox', 'area')
"""What MMDetection's ``CocoDataset`` reads."""
VAL_KEYS = (*INSTANCE_KEYS, 'iscrowd')
"""What pycocotools reads as well."""


def read_annotations(path: str, must: bool = True) -> dict[str, Any] | None:
    """The contents of an annotation file in COCO's form; None if it is of another one, which ``must`` forbids.

    Raises:
        UserError: it must be one, and isn't.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file) if must or path.endswith('.json') else None
    except (ValueError, OSError) as error:
        if must:
            raise UserError(f'{path}: truncated, or not a JSON file ({getattr(error, "strerror", error)})') from None
        return None
    if isinstance(content, Mapping) and isinstance(content.get('images'), list):
        return content
    if must:
        raise UserError(f"{path}: not an annotation file in COCO's form; it has no list 'images'")
    return None


def check_annotations(path: str, content: Mapping[str, Any], classes: Sequence[str] | None,
                      keys: Sequence[str]) -> None:
    """Check what an annotation file says about images, categories and instances.

    Args:
        path: the file, for messages.
        content: see :func:`read_annotations`.
        classes: the data set's classes; None doesn't compare them.
        keys: what every instance must have; with none, instances aren't looked at.

    Raises:
        UserError: the first mistake found, with the image's or the annotation's id.
    """
    images, categories, instances = (content.get(key) or [] for key in ('images', 'categories', 'annotations'))
    _check_entries(path, 'image', images, IMAGE_KEYS)
    _check_entries(path, 'category', categories, CATEGORY_KEYS)
    names = {category['id']: category['name'] for category in categories}
    missing = [name for name in classes or () if name not in names.values()]
    if missing:
        raise UserError(f'metainfo.classes has {missing[:5]}, but {path} has the categories '
                        f'{list(names.values())[:10]}; set metainfo=dict(classes=(...)) to its names')
    if not keys or not instances:
        return
    _check_entries(path, 'annotation', instances, keys)
    sizes = {image['id']: (image['width'], image['height']) for image in images}
    for instance in instances:
        if instance['image_id'] not in sizes or instance['category_id'] not in names:
            key = 'image_id' if instance['image_id'] not in sizes else 'category_id'
            raise UserError(f'{path}: annotation {instance["id"]} has the {key} {instance[key]!r}, which the file '
                            'doesn\'t list')
    try:
        corners = np.array([instance['bbox'] for instance in instances], dtype=float).reshape(len(instances), 4)
    except (TypeError, ValueError):
        wrong = next(instance for instance in instances if not _is_box(instance['bbox']))
        raise UserError(f'{path}: annotation {wrong["id"]} has the bbox {wrong["bbox"]!r}; it must be four '
                        'numbers, x, y, width and height in pixels') from None
    limits = np.array([sizes[instance['image_id']] for instance in instances], dtype=float)
    empty = (corners[:, 2:] <= 0).any(1)  # MMDetection leaves these out
    outside = ((corners[:, :2] >= limits) | (corners[:, :2] + corners[:, 2:] <= 0)).any(1) & ~empty
    for wrong, what in ((~np.isfinite(corners).all(1), 'not finite'), (outside, 'outside of their image')):
        if wrong.any():
            first = instances[int(wrong.argmax())]
            width, height = sizes[first['image_id']]
            raise UserError(f'{path}: boxes {what}: {wrong.sum()}, the first in annotation {first["id"]}: bbox '
                            f'{first["bbox"]} (x, y, width, height) in an image of {width}x{height}')


def cut(content: Mapping[str, Any], images: int) -> dict[str, Any]:
    """The part of an annotation file with a few images, those with annotations first."""
    instances = content.get('annotations') or []
    annotated = dict.fromkeys(instance.get('image_id') for instance in instances)
    some = sorted(content['images'], key=lambda image: image['id'] not in annotated)[:images]
    ids = {image['id'] for image in some}
    return dict(content, images=some, annotations=[one for one in instances if one.get('image_id') in ids])


def _check_entries(path: str, kind: str, entries: Sequence[Any], keys: Iterable[str]) -> None:
    """Refuse an entry without a key, and ids that occur twice."""
    for entry in entries:
        absent = [key for key in keys if not isinstance(entry, Mapping) or key not in entry]
        if absent:
            name = entry.get('id', '?') if isinstance(entry, Mapping) else entry
            raise UserError(f'{path}: {kind} {name} has no {absent[0]!r}; MMDetection needs {", ".join(keys)}')
    twice = [id for id, count in Counter(entry['id'] for entry in entries).items() if count > 1]
    if twice:
        raise UserError(f'{path}: {kind} ids that occur more than once: {len(twice)}, the first is {twice[0]!r}')


def _is_box(value: Any) -> bool:
    """Whether a value is four numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(
        isinstance(number, (int, float)) and not math.isnan(number) for number in value)
