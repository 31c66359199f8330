"""The data of a run: its files, and small copies of its data sets that are built in a moment."""
import json
import os
import os.path as osp
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mmcv
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from ...datasets import DigitScenesDataset
from ..config import nested_dicts, type_name
from ..errors import UserError
from .annotations import INSTANCE_KEYS, VAL_KEYS, check_annotations, cut, read_annotations
from .guard import find_class, named, reason_of

IMAGE_FOLDERS = ('ImageNet', 'CustomDataset')
"""mmpretrain's datasets that are a folder of images for each class."""
IMAGES = 4
"""How many images a small copy of a data set has."""
LOOKED_AT = 500
"""Of how many images of an annotation file at most the first bytes are read, spread over all of it."""


def check_data(cfg: Config, phase: str) -> None:
    """Check that the annotation files and image folders of a phase's loader and evaluator are there, or can be made."""
    nodes = list(nested_dicts(cfg.get(f'{phase}_dataloader') or {}))
    for node in nodes:
        root, prefix = node.get('data_root') or '', node.get('data_prefix')
        setting = f'{phase}_dataloader.dataset'
        _check_text(root, f'{setting}.data_root')
        if node.get('ann_file') not in (None, ''):
            _check_path(root, node['ann_file'], osp.isfile, f'{setting}.ann_file')
        if 'ann_file' in node and isinstance(prefix, Mapping) and prefix.get('img'):
            _check_path(root, prefix['img'], osp.isdir, f'{setting}.data_prefix.img')
        if type_name(node) in IMAGE_FOLDERS and not isinstance(prefix, Mapping):
            _check_path(root, prefix or node.get('split') or '', osp.isdir, f'{setting}.data_root')
    for node in nested_dicts(cfg.get(f'{phase}_evaluator') or {}):
        if node.get('ann_file') and not any(map(_is_digit_scenes, nodes)):
            _check_path('', node['ann_file'], osp.isfile, f'{phase}_evaluator.ann_file')


def make_data(cfg: Config, phase: str) -> None:
    """Let the phase's digit scenes be drawn now, so that what is in their way shows before training."""
    for node in filter(_is_digit_scenes, nested_dicts(cfg.get(f'{phase}_dataloader') or {})):
        try:
            DATASETS.build(dict(node, lazy_init=True))
        except (ValueError, TypeError, OSError) as error:
            raise UserError(f'{phase}_dataloader.dataset: {reason_of(error)}') from error


class SmallData:
    """Small copies of a run's annotation files, and configs of data sets that use them.

    Args:
        folder: where the copies are written.

    Attributes:
        files: the copy of each annotation file, by its path.
        scale: how many times more images the run has.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        self.scale = 1

    def small_(self, dataset: Any, setting: str) -> bool:
        """Let the config of a data set use copies, in place, after checking its annotation files.

        Returns:
            Whether all of its files could be copied; some forms are unknown here.

        Raises:
            UserError: a mistake in an annotation file, or a broken image.
        """
        nodes = [node for node in nested_dicts(dataset) if node.get('ann_file') or _is_digit_scenes(node)]
        known = [self._small_scenes_(node) if _is_digit_scenes(node) else self._small_file_(node, setting)
                 for node in nodes]
        if not known or not all(known):
            return False
        for node in nodes:
            node.pop('indices', None)  # which count in the whole files
        return True

    def small_evaluator_(self, evaluator: Any) -> None:
        """Let an evaluator use the copies that have been made, in place."""
        for node in nested_dicts(evaluator or {}):
            if node.get('ann_file'):
                node['ann_file'] = self.files.get(osp.normpath(node['ann_file']), node['ann_file'])

    def _small_scenes_(self, node: dict[str, Any]) -> bool:
        """Let digit scenes be drawn in the folder, a few of them."""
        name = f'annotations/instances_{node.get("split", "train")}.json'
        self.files[osp.normpath(osp.join(node.get('data_root', 'data/digits'), name))] = osp.join(self.folder, name)
        self.scale = max(self.scale, int(node.get('num_images', 1000)) // IMAGES)
        node.update(data_root=self.folder, num_images=IMAGES)
        return True

    def _small_file_(self, node: dict[str, Any], setting: str) -> bool:
        """Let a data set use the first few images of its annotation file; False if the file's form is unknown."""
        path, cls = osp.normpath(osp.join(node.get('data_root') or '', node['ann_file'])), find_class(
            DATASETS, node.get('type'))
        if path not in self.files:
            content = read_annotations(path, must=isinstance(cls, type) and issubclass(cls, CocoDataset))
            if node.get('proposal_file') or content is None and not path.endswith(('.txt', '.odgt')):
                return False
            if content is None:
                lines = Path(path).read_text(encoding='utf-8').splitlines(keepends=True)
                count, text = len(lines), ''.join(lines[:IMAGES])
            else:
                _check_content(path, content, node, cls, setting)
                count, text = len(content['images']), json.dumps(cut(content, IMAGES))
            self.scale = max(self.scale, count // IMAGES)
            self.files[path] = osp.join(self.folder, f'{len(self.files)}_{osp.basename(path)}')
            Path(self.files[path]).write_text(text, encoding='utf-8')
        node['ann_file'] = self.files[path]
        return True


class Lengthened(Dataset):
    """A small data set that says it is as long as the run's."""

    def __init__(self, dataset: Dataset, scale: int) -> None:
        self.dataset, self.scale = dataset, scale

    def __len__(self) -> int:
        return len(self.dataset) * self.scale

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % len(self.dataset)]

    def get_cat_ids(self, index: int) -> list[int]:
        return self.dataset.get_cat_ids(index % len(self.dataset))

    def get_data_info(self, index: int) -> dict:
        return self.dataset.get_data_info(index % len(self.dataset))

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == 'dataset':
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _check_content(path: str, content: Mapping[str, Any], node: Mapping[str, Any], cls: Any, setting: str) -> None:
    """Check an annotation file in COCO's form, and look at its images, for the data set that is going to read it."""
    if not (isinstance(cls, type) and issubclass(cls, CocoDataset)):
        return
    boxes = cls.parse_data_info is CocoDataset.parse_data_info
    prefix = node.get('data_prefix') or {}
    for key in prefix if boxes else ():
        if key not in ('img', 'seg'):
            raise UserError(f'{setting}.data_prefix.{key}: {cls.__name__} doesn\'t read it; allowed: img, seg')
    classes = (node.get('metainfo') or {}).get('classes', cls.METAINFO.get('classes'))
    if isinstance(classes, str) and not osp.isfile(classes):
        raise UserError(f'{setting}.metainfo.classes must be a tuple of names such as ({classes!r},), or a file of '
                        f'names, got {classes!r}')
    keys = INSTANCE_KEYS if setting.startswith('train') else VAL_KEYS
    with named(f'{setting}.ann_file'):
        check_annotations(path, content, classes if boxes and not isinstance(classes, str) else None,
                          keys if boxes else ())
    if boxes and not node.get('test_mode') and (node.get('filter_cfg') or {}).get('filter_empty_gt'):
        wanted = {category['id'] for category in content.get('categories') or []
                  if not isinstance(classes, (list, tuple)) or category['name'] in classes}
        if not any(instance['category_id'] in wanted for instance in content.get('annotations') or []):
            raise UserError(f'{setting}: {path} has no box of metainfo.classes, and filter_cfg.filter_empty_gt leaves '
                            'out all images without one')
    folder = osp.join(node.get('data_root') or '', prefix.get('img') or '')
    types = {type_name(one) for one in nested_dicts(node.get('pipeline') or [])}
    if '://' not in folder and 'LoadImageFromFile' in types:
        images = content['images']
        for image in images[::len(images) // LOOKED_AT + 1]:
            _check_image(osp.join(folder, image['file_name']), path)


def _check_image(file: str, path: str) -> None:
    """Refuse an image that isn't there, or whose first bytes are no image's."""
    try:
        with Image.open(file):
            return
    except FileNotFoundError:
        raise UserError(f'{file}: there is no such image, but {path} lists it') from None
    except (UnidentifiedImageError, OSError):
        with suppress(Exception):  # MMCV reads some forms that Pillow doesn't
            if mmcv.imread(file) is not None:
                return
        raise UserError(f'{file}: broken, or no image') from None


def _is_digit_scenes(node: Mapping[str, Any]) -> bool:
    return type_name(node) == DigitScenesDataset.__name__


def _check_path(root: str, name: Any, exists: Callable[[str], bool], setting: str) -> None:
    _check_text(name, setting)
    path = osp.join(root, name)
    if '://' not in path and not exists(path):
        raise UserError(f'{setting}: {path} doesn\'t exist (looked from {os.getcwd()}); put the data there or move '
                        'the config with --cfg-options data_root=DIR')


def _check_text(path: Any, setting: str) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f'{setting} must be a path, got {path!r}')
