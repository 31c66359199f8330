"""Replaced blocks get fresh BatchNorm statistics before the first step, once."""
from types import SimpleNamespace

import pytest
import torch
from mmdet.models.detectors import BaseDetector
from torch import nn
from torch.utils.data import DataLoader

from rl_mmdet.engine import RecalibrateNormsHook
from rl_mmdet.replacement import computing_layers, replace_blocks_


class Stack(nn.Module):
    """Stacks the images of a batch, or of each of its branches."""

    def forward(self, data, training):
        assert training
        inputs = data['inputs']
        return dict(inputs={name: torch.stack(images) for name, images in inputs.items()}
                    if isinstance(inputs, dict) else torch.stack(inputs))


class Detector(BaseDetector):
    """A replaced backbone that trains with BatchNorm in eval mode, as far as the hook sees a detector."""
    loss = predict = _forward = None

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.data_preprocessor = Stack()
        self.backbone = backbone
        self.seen = 0

    def train(self, mode: bool = True) -> 'Detector':
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def extract_feat(self, inputs):
        self.seen += len(inputs)
        return self.backbone(inputs)


class Pair(Detector):
    """A student and a teacher, trained on two branches of data."""

    def __init__(self, student: Detector, teacher: Detector) -> None:
        super().__init__(nn.Identity())
        self.student = student
        self.teacher = teacher


@pytest.fixture
def runner(toy_net):
    backbone = toy_net()
    replace_blocks_(backbone, dict(plan=dict(type='EveryKth', k=2)))
    images = [dict(inputs=torch.randn(3, 8, 8)) for _ in range(10)]
    loader = DataLoader(images, batch_size=2, collate_fn=lambda items: dict(inputs=[item['inputs'] for item in items]))
    return SimpleNamespace(model=Detector(backbone), train_dataloader=loader, seed=0)


def test_stale_statistics_are_recalibrated_once_on_the_asked_number_of_batches(runner):
    before = {name: layer.norm1.running_mean.clone() for name, layer in computing_layers(runner.model).items()}
    runner.model.eval()
    for _ in range(2):
        RecalibrateNormsHook(num_batches=3).before_train(runner)
        assert runner.model.seen == 6
    for name, layer in computing_layers(runner.model).items():
        assert not torch.equal(layer.norm1.running_mean, before[name])
        assert not layer.norm_stale
    assert not runner.model.training


def test_a_student_and_its_teacher_see_the_images_of_all_branches(runner, toy_net):
    other = toy_net()
    replace_blocks_(other, dict(plan=dict(type='EveryKth', k=2)))
    runner.model = Pair(runner.model, Detector(other))
    images = [dict(inputs=dict(labelled=torch.randn(3, 8, 8), unlabelled=torch.randn(3, 8, 8))) for _ in range(10)]
    runner.train_dataloader = DataLoader(images, batch_size=2, collate_fn=lambda items: dict(inputs={
        branch: [item['inputs'][branch] for item in items] for branch in ('labelled', 'unlabelled')}))
    RecalibrateNormsHook(num_batches=3).before_train(runner)
    assert (runner.model.seen, runner.model.student.seen, runner.model.teacher.seen) == (0, 12, 12)
    assert not any(layer.norm_stale for layer in computing_layers(runner.model).values())


def test_frames_of_videos_are_images(runner):
    videos = [dict(inputs=torch.randn(4, 3, 8, 8)) for _ in range(10)]
    runner.train_dataloader = DataLoader(videos, batch_size=2, collate_fn=runner.train_dataloader.collate_fn)
    RecalibrateNormsHook(num_batches=3).before_train(runner)
    assert runner.model.seen == 24


@pytest.mark.parametrize('num_batches', [0, 1.5, '3'])
def test_wrong_number_of_batches_is_refused(num_batches):
    with pytest.raises(ValueError, match='num_batches must be an integer of at least 1'):
        RecalibrateNormsHook(num_batches=num_batches)
