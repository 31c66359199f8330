"""Digit scenes on disk: a split is written once and reused only when it is whole. ::

    <root>/annotations/instances_<split>.json      COCO annotations
    <root>/annotations/digit_scenes_<split>.json   the record: settings; sizes once complete
    <root>/annotations/digit_scenes_<split>.lock   one process generates, the others wait
    <root>/<split>/000000.png ...                  RGB images
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from .digit_drawing import CLASSES, DRAWING_VERSION, SceneSettings, check_split, digit_samples, draw_scene

logger = logging.getLogger(__name__)


def generate_digit_scenes(root: str | os.PathLike, split: str, num_images: int,
                          image_size: tuple[int, int] = (160, 160), seed: int = 0,
                          digits_per_image: tuple[int, int] = (2, 6),
                          scales: tuple[int, int] = (16, 56), max_overlap: float = 0.2,
                          clutter: tuple[int, int] = (2, 8)) -> str:
    """Make sure that a split of digit scenes is on disk, and return its annotation file.

    The same arguments give the same bytes, and image ``i`` does not depend on ``num_images``. A
    whole split with the same settings is reused; an interrupted or damaged one, or one with other
    settings, is made again in place. Use one root per kind of scenes if several are needed at once.

    Args:
        root: Folder of the dataset, made if missing.
        split: 'train' or 'val'; they share no handwriting, see ``digit_samples``.
        num_images: Number of scenes, >= 1.
        image_size: (width, height) in px, each >= 64.
        seed: Seed of the scenes, >= 0. The samples of a split do not depend on it.
        digits_per_image: Fewest and most digits, >= 1; one that finds no free place is left out.
        scales: Smallest and largest side in px of the 8x8 sample as drawn, >= 8; log-uniform.
        max_overlap: Cap on what two boxes share, in [0, 1), as a fraction of the smaller box; so it
            bounds their IoU too.
        clutter: Fewest and most pieces of clutter (blobs and strokes) behind the digits.

    Returns:
        Path of ``<root>/annotations/instances_<split>.json``.

    Raises:
        ValueError: If an argument is out of range; nothing is written then.
        FileExistsError: If files that this function did not make are in the way; they are left
            untouched.
    """
    check_split(split)
    settings = SceneSettings(num_images, image_size, seed, digits_per_image, scales, max_overlap,
                             clutter)
    store = _Store(Path(root), split)
    if store.fault(settings) is None:  # without the lock, so that a read-only disk will do
        return str(store.annotations)
    store.refuse_foreign_files(before_lock=True)
    with store.locked():
        fault = store.fault(settings)
        if fault is not None:
            store.refuse_foreign_files()
            if store.read_record() is not None:
                logger.warning('Making the %s digit scenes in %s again: %s.', split, root, fault)
            store.make(settings)
    return str(store.annotations)


class _Store:
    """The files of one split.

    The record is written before the first file is touched, with ``complete`` false, and again after
    the last, with the size of every file. So whatever interrupts the work leaves a record that is
    not complete, and a file is ours only if the record accounts for it.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.split = split
        self.images = root / split
        self.annotations = root / 'annotations' / f'instances_{split}.json'
        self.record = root / 'annotations' / f'digit_scenes_{split}.json'
        self.lock = root / 'annotations' / f'digit_scenes_{split}.lock'

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the split's lock; the operating system frees it however the process ends."""
        # Imported here: POSIX only, and elsewhere the rest of the package shall work.
        import fcntl

        self.lock.parent.mkdir(parents=True, exist_ok=True)
        with open(self.lock, 'a') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read_record(self) -> dict | None:
        """Return the record, or None if there is none.

        Raises:
            FileExistsError: If the file is not a record of ours.
        """
        try:
            record = json.loads(self.record.read_text())
            return {**record, 'claimed': int(record['claimed']), 'settings': dict(record['settings'])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise FileExistsError(
                f'{self.record} is not a record of digit scenes. Choose another root (data_root), '
                f'or delete it with {self.annotations} and {self.images} to have them made again.'
            ) from None

    def fault(self, settings: SceneSettings) -> str | None:
        """Say why the split cannot be used as it is, or return None if it can."""
        record = self.read_record()
        if record is None:
            return 'there are none yet'
        asked = _settings_entry(settings)
        found = record['settings']
        changed = [f'{key} {found.get(key)} -> {value}'
                   for key, value in asked.items() if found.get(key) != value]
        if changed:
            return 'settings changed: ' + ', '.join(changed)
        if not record['complete']:
            return 'the last generation was interrupted'
        try:
            digest = _sha256(self.annotations.read_bytes())
        except FileNotFoundError:
            return f'{self.annotations.name} is missing'
        if digest != record['annotations_sha256']:
            return f'{self.annotations.name} was changed'
        sizes = self._image_sizes()
        for name, size in record['image_bytes'].items():
            if sizes.get(name) != size:
                return f'{self.split}/{name} is missing or incomplete'
        return None

    def refuse_foreign_files(self, before_lock: bool = False) -> None:
        """Raise FileExistsError if there are files that the record does not account for.

        Args:
            before_lock: Whether the lock is not held yet. If a lock file exists then, the files may
                be those of a process at work, and nothing is refused; the check comes again later.
        """
        images, annotated = set(self._image_sizes()), self.annotations.exists()
        if before_lock and self.lock.exists():
            return
        record = self.read_record()
        claimed = set() if record is None else {_image_name(i) for i in range(record['claimed'])}
        foreign = [self.annotations] if annotated and record is None else []
        foreign += [self.images / name for name in sorted(images - claimed)]
        if foreign:
            raise FileExistsError(
                f'{foreign[0]} and {len(foreign) - 1} more were not made by the digit-scene '
                'generator and are left as they are. Choose another root (data_root) or move them.')

    def make(self, settings: SceneSettings) -> None:
        """Write every file anew; the record comes first, unfinished, and last, complete."""
        old = self.read_record()
        count = settings.num_images
        record = {
            'settings': _settings_entry(settings),
            'complete': False,
            'claimed': max(count, old['claimed'] if old else 0),  # images 0..claimed-1 may be ours
        }
        _write_atomic(self.record, _json_bytes(record))
        self.annotations.unlink(missing_ok=True)
        self.images.mkdir(parents=True, exist_ok=True)
        for i in range(count, record['claimed']):
            (self.images / _image_name(i)).unlink(missing_ok=True)
        coco, sizes = self._draw_images(settings)
        annotations = _json_bytes(coco)
        _write_atomic(self.annotations, annotations)
        record.update(complete=True, claimed=count, annotations_sha256=_sha256(annotations),
                      image_bytes=sizes)
        _write_atomic(self.record, _json_bytes(record))

    def _draw_images(self, settings: SceneSettings) -> tuple[dict, dict[str, int]]:
        """Draw and write the PNGs; return the COCO content and each PNG's size in bytes."""
        _, samples, labels = digit_samples(self.split)
        width, height = settings.image_size
        images, annotations, sizes = [], [], {}
        for i in tqdm(range(settings.num_images), f'digit scenes {self.split}', unit='image',
                      mininterval=0.5):
            scene, instances = draw_scene(settings, self.split, i, samples, labels)
            name = _image_name(i)
            sizes[name] = _write_png(self.images / name, scene)
            images.append({'id': i, 'file_name': name, 'width': width, 'height': height})
            for instance in instances:
                annotations.append({'id': len(annotations) + 1, 'image_id': i, **instance})
        coco = {
            'info': {'description': 'Scenes of handwritten digits (scikit-learn load_digits)'},
            'images': images,
            'annotations': annotations,
            'categories': [{'id': n, 'name': name} for n, name in enumerate(CLASSES, start=1)],
        }
        return coco, sizes

    def _image_sizes(self) -> dict[str, int]:
        """Sizes in bytes of what lies in the image folder, hidden files left out."""
        if not self.images.is_dir():
            return {}
        sizes = {}
        for path in self.images.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process may be replacing it
                sizes[path.name] = path.stat().st_size
        return {name: size for name, size in sizes.items() if not name.startswith('.')}


def _settings_entry(settings: SceneSettings) -> dict:
    """The settings as JSON gives them back, with the generator's version."""
    return json.loads(json.dumps({'version': DRAWING_VERSION, **dataclasses.asdict(settings)}))


def _image_name(index: int) -> str:
    return f'{index:06d}.png'


def _write_png(path: Path, image: np.ndarray) -> int:
    """Write an RGB image, quickly rather than small; return the size in bytes."""
    options = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
    encoded = cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1]
    return path.write_bytes(encoded.tobytes())


def _json_bytes(content: dict) -> bytes:
    return json.dumps(content, separators=(',', ':')).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_atomic(path: Path, content: bytes) -> None:
    """Write so that ``path`` holds the old or the whole new content, whatever interrupts."""
    temporary = path.with_name(path.name + '.tmp')
    with open(temporary, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
