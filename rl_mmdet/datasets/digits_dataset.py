"""The digit scenes as an MMDetection dataset."""
import os
from typing import ClassVar

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from .digit_drawing import CLASSES
from .digit_scenes import generate_digit_scenes


@DATASETS.register_module()
class DigitScenesDataset(CocoDataset):
    """COCO dataset of digit scenes that makes its files when it is constructed.

    The files are made before they are read, also with ``lazy_init=True``, and by one process of a distributed run while
    the others wait. An evaluator may therefore name the annotation file,
    ``<data_root>/annotations/instances_<split>.json``, before it exists: MMEngine's loops build their dataloader before
    their evaluator. Code that builds a ``CocoMetric`` by itself, which opens the file at once, builds this dataset
    first.

    Args:
        data_root: Folder that holds train and val, made if missing.
        split: 'train' or 'val'.
        num_images, image_size, seed: See :func:`~rl_mmdet.datasets.digit_scenes.generate_digit_scenes`.
        **kwargs: Arguments of ``CocoDataset`` but ``ann_file`` and ``data_prefix``: ``pipeline``, ``filter_cfg``,
            ``test_mode``, ``backend_args`` and so on.

    Raises:
        ValueError: If ``ann_file`` or ``data_prefix`` is given, or a value is out of range.
        FileExistsError: If files of another origin are in the way.
    """

    METAINFO: ClassVar[dict] = {
        'classes': CLASSES,
        'palette': [(230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
                    (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (0, 128, 128)],
    }

    def __init__(self, *, data_root: str = 'data/digits', split: str = 'train', num_images: int = 1000,
                 image_size: tuple[int, int] = (128, 128), seed: int = 0, **kwargs) -> None:
        for name in ('ann_file', 'data_prefix'):
            if name in kwargs:
                raise ValueError(f'{name}={kwargs[name]!r}: DigitScenesDataset sets it from data_root and split; '
                                 'remove it from the config.')
        annotations = generate_digit_scenes(data_root, split, num_images, image_size, seed)
        super().__init__(data_root=data_root, ann_file=os.path.relpath(annotations, data_root),
                         data_prefix={'img': f'{split}/'}, **kwargs)
