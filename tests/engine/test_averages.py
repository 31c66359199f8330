"""The average that RTMDet and YOLOX train with, under both sets of packages."""
import math

import torch
from mmdet.models.layers import ExpMomentumEMA
from torch import nn

import rl_mmdet  # noqa: F401  which mends MMDetection's


def test_what_does_not_change_is_averaged_bit_for_bit_and_the_rest_by_its_formula():
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(learns=nn.Linear(30, 30), stays=nn.Linear(30, 30)))
    average = ExpMomentumEMA(model, momentum=0.0002, gamma=20)
    expected = model['learns'].weight.detach().double()
    for step in range(200):
        with torch.no_grad():
            model['learns'].weight.add_(0.01)
        average.update_parameters(model)
        m = 0.0002 + (1 - 0.0002) * math.exp(-(1 + step) / 20) if step else 1
        expected = (1 - m) * expected + m * model['learns'].weight.detach().double()
    assert torch.equal(average.module['stays'].weight, model['stays'].weight)
    torch.testing.assert_close(average.module['learns'].weight.double(), expected, rtol=1e-4, atol=1e-4)
