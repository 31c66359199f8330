"""Digit scenes on disk, in COCO's layout. ::

    <root>/<split>/000000.png ...                  RGB images
    <root>/annotations/instances_<split>.json      COCO annotations
    <root>/annotations/digit_scenes_<split>.json   the settings that both were made with, written last
"""
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from .digit_drawing import CLASSES, DRAWING_VERSION, SPLITS, SceneSettings, digit_samples, draw_scene

logger = logging.getLogger(__name__)


def generate_digit_scenes(root: str | os.PathLike, split: str, num_images: int, **settings: Any) -> str:
    """Make sure that a split of digit scenes is on disk, and return its annotation file.

    The same arguments give the same bytes, and image ``i`` does not depend on ``num_images``. A split with the same
    settings is reused; an unfinished one, or one with other settings, is replaced: its folder belongs to this function.

    Args:
        root: Folder of the dataset, made if missing.
        split: 'train' or 'val'; they share no handwriting, see ``digit_samples``.
        num_images: Number of scenes.
        **settings: The other arguments of :class:`~rl_mmdet.datasets.digit_drawing.SceneSettings`.

    Returns:
        Path of ``<root>/annotations/instances_<split>.json``.

    Raises:
        ValueError: If an argument is out of range; nothing is written then.
        FileExistsError: If the split's folder or annotation file is there and is not ours; both are left untouched.
    """
    if split not in SPLITS:
        raise ValueError(f'split={split!r}: unknown; choose one of {SPLITS}.')
    settings = SceneSettings(num_images, **settings)
    files = _Split(Path(root), split)
    if not files.are_made_with(settings):  # asked without the lock first, so that a read-only disk will do
        files.refuse_what_is_not_ours()
        with files.locked():
            if not files.are_made_with(settings):
                files.make(settings)
    return str(files.annotations)


class _Split:
    """The files of one split."""

    def __init__(self, root: Path, split: str) -> None:
        self.split = split
        self.images = root / split
        self.annotations = root / 'annotations' / f'instances_{split}.json'
        self.settings = root / 'annotations' / f'digit_scenes_{split}.json'

    def are_made_with(self, settings: SceneSettings) -> bool:
        """Whether all files are there, and were made with these settings."""
        return (self.settings.is_file() and self.settings.read_text() == _as_text(settings)
                and self.annotations.is_file() and len(list(self.images.glob('*.png'))) == settings.num_images)

    def refuse_what_is_not_ours(self) -> None:
        """Raise FileExistsError if files are there without a settings file, which is written before them."""
        present = [path for path in (self.images, self.annotations) if path.exists()]
        if present and not self.settings.exists():
            raise FileExistsError(f'{present[0]} was not made by the digit-scene generator and is left as it is. '
                                  'Choose another root (data_root) or move it.')

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process generates while the others wait; the operating system frees the lock however it ends."""
        import fcntl  # here, because it is there on POSIX only

        self.settings.parent.mkdir(parents=True, exist_ok=True)
        with self.settings.with_suffix('.lock').open('a') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def make(self, settings: SceneSettings) -> None:
        """Draw everything beside its place, then move it there."""
        if self.settings.exists():
            logger.warning('Making the %s digit scenes in %s again. Asked for: %s. There: %s.', self.split,
                           self.images.parent, _as_text(settings), self.settings.read_text() or 'unfinished ones')
        unfinished = self.images.with_name(f'.{self.split}.unfinished')
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        coco = _draw(settings, self.split, unfinished)
        self.settings.write_text('')  # ours, but not whole
        if self.images.exists():
            shutil.rmtree(self.images)
        unfinished.rename(self.images)
        self.annotations.write_text(json.dumps(coco, separators=(',', ':')))
        self.settings.write_text(_as_text(settings))


def _as_text(settings: SceneSettings) -> str:
    """The content of a settings file."""
    return json.dumps({'version': DRAWING_VERSION, **dataclasses.asdict(settings)})


def _draw(settings: SceneSettings, split: str, folder: Path) -> dict:
    """Write the images of a split into a folder; return its COCO annotations."""
    _, samples, labels = digit_samples(split)
    width, height = settings.image_size
    images, annotations = [], []
    for i in tqdm(range(settings.num_images), f'digit scenes {split}', unit='image', mininterval=0.5):
        scene, instances = draw_scene(settings, split, i, samples, labels)
        name = f'{i:06d}.png'
        _write_png(folder / name, scene)
        images.append({'id': i, 'file_name': name, 'width': width, 'height': height})
        first = len(annotations) + 1
        annotations += [{'id': n, 'image_id': i, **instance} for n, instance in enumerate(instances, first)]
    categories = [{'id': n, 'name': name} for n, name in enumerate(CLASSES, start=1)]
    info = {'description': 'Scenes of handwritten digits (scikit-learn load_digits)'}
    return {'info': info, 'images': images, 'annotations': annotations, 'categories': categories}


def _write_png(path: Path, image: np.ndarray) -> None:
    """Write an RGB image, quickly rather than small; unlike ``cv2.imwrite``, raise OSError where that fails."""
    options = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
    path.write_bytes(cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes())
