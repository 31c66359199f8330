"""A tiny detector as a config of the zoo."""
from collections.abc import Callable
from typing import Any

import pytest

from rl_mmdet.analysis.zoo import ZooConfig


@pytest.fixture
def tiny_model() -> Callable[..., dict[str, Any]]:
    """The config of an FCOS with 4 channels, with settings of its backbone changed."""
    def build(**backbone: Any) -> dict[str, Any]:
        body = dict(type='ResNet', depth=50, base_channels=4, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1),
                    out_indices=(1, 2), norm_eval=True)
        return dict(
            type='FCOS', data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
            backbone=body | backbone, neck=dict(type='FPN', in_channels=[32, 64], out_channels=8, num_outs=2),
            bbox_head=dict(type='FCOSHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1,
                           norm_cfg=None, strides=[8, 16], regress_ranges=((-1, 64), (64, 1e8))),
            test_cfg=dict(nms_pre=100, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10))
    return build


@pytest.fixture
def tiny_config(tiny_model: Callable[..., dict[str, Any]]) -> Callable[..., ZooConfig]:
    """The same, as a config of the zoo."""
    return lambda name='tiny/fcos.py', **backbone: ZooConfig(name, tiny_model(**backbone))
