"""A tiny detector on tiny images in COCO's form, which a test then gets wrong."""
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from mistakes import write_data
from rl_mmdet.engine import add_rl_defaults_, check_training, load_config

CONFIG = '''
_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
custom_imports = dict(imports=['rl_mmdet'], allow_failed_imports=False)
model = dict(
    backbone=dict(type='RLResNet', depth=34, base_channels=4, init_cfg=None, replacement=dict(plan=dict(k=2))),
    neck=dict(in_channels=[4, 8, 16, 32], out_channels=8),
    bbox_head=dict(num_classes=1, in_channels=8, feat_channels=8, stacked_convs=1))
data = dict(data_root='ROOT/', metainfo=dict(classes=('kangaroo',)), data_prefix=dict(img='images/'))
workers = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=2, dataset=dict(ann_file='train.json', **data), **workers)
val_dataloader = dict(dataset=dict(ann_file='val.json', **data), **workers)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='ROOT/val.json')
test_evaluator = val_evaluator
'''


@pytest.fixture(scope='session')
def kangaroos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, ``train.json`` and ``val.json``."""
    root = tmp_path_factory.mktemp('kangaroos')
    write_data(root, 'train.json', 'val.json')
    return root


@pytest.fixture(scope='session')
def parsed(kangaroos: Path) -> Config:
    """The config of the tiny detector, read once."""
    path = kangaroos / 'kangaroo.py'
    path.write_text(CONFIG.replace('ROOT', str(kangaroos)))
    return load_config(str(path))


@pytest.fixture
def check(parsed: Config, tmp_path: Path) -> Callable[..., list[str]]:
    """Check a training with some settings changed, by dotted key; a callable changes the config."""
    def run(changes: dict[str, Any], name: str = 'work') -> list[str]:
        cfg = copy.deepcopy(parsed)
        cfg.work_dir = str(tmp_path / name)
        cfg.merge_from_dict(changes)
        return check_training(add_rl_defaults_(cfg))
    return run
