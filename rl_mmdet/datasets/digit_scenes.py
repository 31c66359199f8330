"""Digit scenes on disk, in COCO's layout. ::

    <root>/<split>/000000.png ...                  RGB images
    <root>/annotations/instances_<split>.json      COCO annotations
    <root>/annotations/digit_scenes_<split>.json   the settings that both were made with, written last
"""
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ..replacement.checks import check_number
from .digit_drawing import CLASSES, DRAWING_VERSION, SPLITS, digit_samples, draw_scene

logger = logging.getLogger(__name__)


def generate_digit_scenes(root: str | os.PathLike, split: str, num_images: int,
                          image_size: tuple[int, int] = (128, 128), seed: int = 0) -> str:
    """Make sure that a split of digit scenes is on disk, and return its annotation file.

    The same arguments give the same bytes, and image ``i`` does not depend on ``num_images``. A split with the same
    settings is reused; an unfinished one, or one with other settings, is replaced: its folder belongs to this function.

    Args:
        root: Folder of the dataset, made if missing.
        split: 'train' or 'val'; they share no handwriting, see ``digit_samples``.
        num_images: Number of scenes, >= 1.
        image_size: (width, height) in px, each >= 64.
        seed: Seed of the scenes, >= 0.

    Returns:
        Path of ``<root>/annotations/instances_<split>.json``.

    Raises:
        ValueError: If an argument is out of range; nothing is written then.
        FileExistsError: If the split's folder or annotation file is there and is not ours; both are left untouched.
    """
    if split not in SPLITS:
        raise ValueError(f'split={split!r}: unknown; choose one of {SPLITS}.')
    check_number('num_images', num_images, whole=True, least=1)
    check_number('seed', seed, whole=True, least=0)
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise ValueError(f'image_size={image_size!r}: expected two integers (width, height).')
    for side in image_size:
        check_number('image_size', side, whole=True, least=64)
    images, annotations, record = _paths(Path(root), split)
    text = json.dumps({'version': DRAWING_VERSION, 'num_images': num_images, 'image_size': [*image_size], 'seed': seed})

    def is_there() -> bool:
        """Whether all files are there, and were made with these settings."""
        return (record.is_file() and record.read_text() == text and annotations.is_file()
                and len(list(images.glob('*.png'))) == num_images)

    if is_there():  # asked without the lock first, so that a read-only disk will do
        return str(annotations)
    for path in (images, annotations):
        if path.exists() and not record.exists():  # which is written before them
            raise FileExistsError(f'{path} was not made by the digit-scene generator and is left as it is. Choose '
                                  'another root (data_root) or move it.')
    with _locked(record):
        if not is_there():
            if record.exists():
                logger.warning('Making the %s digit scenes in %s again. Asked for: %s. There: %s.', split, root, text,
                               record.read_text() or 'unfinished ones')
            unfinished = images.with_name(f'.{split}.unfinished')
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            coco = _draw(split, num_images, tuple(image_size), seed, unfinished)
            record.write_text('')  # ours, but not whole
            if images.exists():
                shutil.rmtree(images)
            unfinished.rename(images)
            annotations.write_text(json.dumps(coco, separators=(',', ':')))
            record.write_text(text)
    return str(annotations)


def _paths(root: Path, split: str) -> tuple[Path, Path, Path]:
    """A split's folder of images, its annotations, and the record of the settings that both were made with."""
    folder = root / 'annotations'
    return root / split, folder / f'instances_{split}.json', folder / f'digit_scenes_{split}.json'


@contextmanager
def _locked(record: Path) -> Iterator[None]:
    """One process generates while the others wait; the operating system frees the lock however it ends."""
    import fcntl  # here, because it is there on POSIX only

    record.parent.mkdir(parents=True, exist_ok=True)
    with record.with_suffix('.lock').open('a') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _draw(split: str, num_images: int, image_size: tuple[int, int], seed: int, folder: Path) -> dict:
    """Write the images of a split into a folder; return its COCO annotations."""
    _, samples, labels = digit_samples(split)
    images, annotations = [], []
    for i in tqdm(range(num_images), f'digit scenes {split}', unit='image', mininterval=0.5):
        scene, instances = draw_scene(image_size, seed, split, i, samples, labels)
        name = f'{i:06d}.png'
        _write_png(folder / name, scene)
        images.append({'id': i, 'file_name': name, 'width': image_size[0], 'height': image_size[1]})
        first = len(annotations) + 1
        annotations += [{'id': n, 'image_id': i, **instance} for n, instance in enumerate(instances, first)]
    categories = [{'id': n, 'name': name} for n, name in enumerate(CLASSES, start=1)]
    info = {'description': 'Scenes of handwritten digits (scikit-learn load_digits)'}
    return {'info': info, 'images': images, 'annotations': annotations, 'categories': categories}


def _write_png(path: Path, image: np.ndarray) -> None:
    """Write an RGB image, quickly rather than small; unlike ``cv2.imwrite``, raise OSError where that fails."""
    options = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
    path.write_bytes(cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes())
