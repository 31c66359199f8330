"""DepthwiseBlock: the equation, what it costs, and which blocks it can stand for."""
import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.resnext import Bottleneck as ResNeXtBottleneck
from torch import nn

from rl_mmdet.replacement import materialize
from rl_mmdet.replacement.flops import count_flops
from rl_mmdet.replacement.operators import DepthwiseBlock

DEPTHWISE = dict(type='DepthwiseBlock', scale=0.3)


@pytest.mark.parametrize(('make', 'channels', 'dilation'), [
    (lambda: BasicBlock(8, 8), 8, 1), (lambda: Bottleneck(16, 4), 16, 1),
    (lambda: Bottleneck(16, 4, dilation=2), 16, 2),
    (lambda: ResNeXtBottleneck(16, 4, groups=4, base_width=8, base_channels=4), 16, 1),
], ids=['basic', 'bottleneck', 'dilated', 'resnext'])
def test_equation(build, fused, unit, make, channels, dilation):
    net, x = build(make, DEPTHWISE), torch.randn(2, channels, 6, 6)
    weight = fused(net, 'conv2.weight')
    kernel = unit(weight.sum(1) / weight.shape[1])
    expected = torch.stack([x[:, c] + net.blocks[1].scale[c] * F.conv2d(
        x[:, c:c + 1], kernel[c * len(weight) // channels][None, None], padding=dilation, dilation=dilation)[:, 0]
        for c in range(channels)], 1)
    torch.testing.assert_close(net.blocks[1](x), expected)
    for block in (net.blocks[0], net.blocks[2]):  # it is indifferent to their scale
        block.conv2.weight.data.mul_(7)
    torch.testing.assert_close(net.blocks[1](x), expected)


def test_costs_next_to_nothing_and_keeps_its_input(build, saved_per_position):
    x = torch.randn(1, 128, 12, 12)
    layer, block = (build(lambda: Bottleneck(128, 32), operator).blocks[1] for operator in (DEPTHWISE, None))
    with torch.no_grad():
        assert count_flops(lambda: block(x)) == 34 * 32 ** 2 * 144
        assert count_flops(lambda: layer(x)) == 2 * 9 * 128 * 144
    assert saved_per_position(layer, 128, 12, 12) == 128


def test_materialized_it_is_one_convolution(build):
    plain = materialize(build(lambda: Bottleneck(16, 4), DEPTHWISE)).blocks[1]
    assert type(plain) is nn.Conv2d
    assert (plain.groups, plain.bias) == (16, None)


def test_refuses_kernels_of_even_size():
    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 1)

    assert DepthwiseBlock().why_not(Even()).endswith('conv1 has a kernel of even size; what fits: FullBlock')
