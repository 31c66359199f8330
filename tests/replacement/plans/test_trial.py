"""Trials: a twin that is replaced, and FLOPs of one forward run."""
import pytest
import torch
from torch import nn

from rl_mmdet.replacement import computing_layers
from rl_mmdet.replacement.plans.trial import forward_flops, replaced_twin


def test_twin_has_the_models_own_parameters_and_its_own_buffers(toy_net, snapshot):
    net = toy_net()
    before = snapshot(net)
    twin = replaced_twin(net, {'layer2': [1]}, None)
    assert list(computing_layers(twin)) == ['layer2.1']
    assert not any(module.training for module in twin.modules())
    assert twin.layer2[0].conv1.weight is net.layer2[0].conv1.weight
    assert twin.layer2[1].norm1.running_mean is not net.layer2[1].norm1.running_mean
    assert snapshot(net)[0] == before[0]


def test_flops_of_a_convolution():
    assert forward_flops(nn.Conv2d(3, 8, 3, padding=1), (6, 4)) == 2 * 8 * 27 * 6 * 4


def test_flops_on_an_image_that_the_model_cant_take_raises():
    with pytest.raises(ValueError, match=r"Linear can't run on a 1x3x6x4 image.*set another image_size"):
        forward_flops(nn.Linear(5, 3), (6, 4))
    torch.testing.assert_close(forward_flops(nn.Linear(4, 3), (6, 4)), 2 * 3 * 6 * 4 * 3)
