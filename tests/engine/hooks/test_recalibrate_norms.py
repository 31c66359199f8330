"""Replaced blocks get fresh BatchNorm statistics before the first step, once."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from rl_mmdet.engine import RecalibrateNormsHook
from rl_mmdet.replacement import computing_layers, replace_blocks_


class Detector(nn.Module):
    """A replaced backbone that trains with BatchNorm in eval mode, as far as the hook sees a detector."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.seen = 0

    def train(self, mode: bool = True) -> 'Detector':
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def data_preprocessor(self, data, training):
        assert training
        return dict(inputs=torch.stack(data['inputs']))

    def extract_feat(self, inputs):
        self.seen += len(inputs)
        return self.backbone(inputs)


@pytest.fixture
def runner(toy_net):
    backbone = toy_net()
    replace_blocks_(backbone, dict(plan=dict(type='EveryKth', k=2)))
    images = [dict(inputs=torch.randn(3, 8, 8)) for _ in range(10)]
    loader = DataLoader(images, batch_size=2, collate_fn=lambda items: dict(inputs=[item['inputs'] for item in items]))
    return SimpleNamespace(model=Detector(backbone), train_dataloader=loader, seed=0)


def test_stale_statistics_are_recalibrated_on_the_asked_number_of_batches(runner):
    before = {name: layer.norm1.running_mean.clone() for name, layer in computing_layers(runner.model).items()}
    RecalibrateNormsHook(num_batches=3).before_train(runner)
    assert runner.model.seen == 6
    for name, layer in computing_layers(runner.model).items():
        assert not torch.equal(layer.norm1.running_mean, before[name])
        assert not layer.norm_stale


def test_fresh_statistics_are_left_alone(runner):
    hook = RecalibrateNormsHook(num_batches=3)
    hook.before_train(runner)
    hook.before_train(runner)
    assert runner.model.seen == 6


def test_the_models_mode_is_left_as_it_was(runner):
    runner.model.eval()
    RecalibrateNormsHook(num_batches=1).before_train(runner)
    assert not runner.model.training


@pytest.mark.parametrize('num_batches', [0, -1, 1.5, '3'])
def test_wrong_number_of_batches_is_refused(num_batches):
    with pytest.raises(ValueError, match='num_batches must be an integer of at least 1'):
        RecalibrateNormsHook(num_batches=num_batches)
