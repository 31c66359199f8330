"""Replaced blocks get fresh BatchNorm statistics before the first step, once."""
from types import SimpleNamespace

import pytest
import torch
from mmdet.models.detectors import BaseDetector
from torch import nn
from torch.utils.data import DataLoader, default_collate

from rl_mmdet.engine import RecalibrateNormsHook
from rl_mmdet.replacement import computing_layers, replace_blocks_


class Same(nn.Module):
    """Preprocesses nothing."""

    def forward(self, data, training):
        return data


class Detector(BaseDetector):
    """A backbone that trains with BatchNorm in eval mode, as far as the hook sees a detector."""
    loss = predict = _forward = None

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.data_preprocessor = Same()
        self.seen = 0
        for name, module in modules.items():
            self.add_module(name, module)

    def train(self, mode: bool = True) -> 'Detector':
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def extract_feat(self, inputs):
        self.seen += len(inputs)
        return self.backbone(inputs)


@pytest.fixture
def detector(toy_net):
    """Build a detector with a replaced backbone."""
    def build():
        backbone = toy_net()
        replace_blocks_(backbone, dict(plan=dict(type='EveryKth', k=2)))
        return Detector(backbone=backbone)
    return build


def recalibrate(model, item):
    """Run the hook on 3 batches of 2 from 10 equal items, in front of a training."""
    loader = DataLoader([dict(inputs=item)] * 10, batch_size=2, collate_fn=default_collate)
    RecalibrateNormsHook(num_batches=3).before_train(SimpleNamespace(model=model, train_dataloader=loader, seed=0))


def test_stale_statistics_are_recalibrated_once_on_the_asked_number_of_batches(detector):
    model = detector().eval()
    before = {name: layer.norm1.running_mean.clone() for name, layer in computing_layers(model).items()}
    for _ in range(2):
        recalibrate(model, torch.randn(3, 8, 8))
        assert model.seen == 6
    for name, layer in computing_layers(model).items():
        assert not torch.equal(layer.norm1.running_mean, before[name])
        assert not layer.norm_stale
    assert not model.training


def test_a_student_and_its_teacher_see_the_images_of_all_branches(detector):
    pair = Detector(student=detector(), teacher=detector())
    recalibrate(pair, dict(labelled=torch.randn(3, 8, 8), unlabelled=torch.randn(3, 8, 8)))
    assert (pair.seen, pair.student.seen, pair.teacher.seen) == (0, 12, 12)
    assert not any(layer.norm_stale for layer in computing_layers(pair).values())


def test_frames_of_videos_are_images(detector):
    model = detector()
    recalibrate(model, torch.randn(4, 3, 8, 8))
    assert model.seen == 24


@pytest.mark.parametrize('num_batches', [0, 1.5, '3'])
def test_wrong_number_of_batches_is_refused(num_batches):
    with pytest.raises(ValueError, match='num_batches must be an integer of at least 1'):
        RecalibrateNormsHook(num_batches=num_batches)
