"""SlimBlock: the equations, what it costs, and which blocks it can stand for."""
import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones.res2net import Bottle2neck
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.resnext import Bottleneck as ResNeXtBottleneck
from mmdet.models.backbones.swin import SwinBlock
from timm.layers import SEModule
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.vision_transformer import Block
from torch import nn

from rl_mmdet.replacement import materialize
from rl_mmdet.replacement.flops import count_flops
from rl_mmdet.replacement.operators import SlimBlock

SLIM = dict(type='SlimBlock', width=0.5, scale=0.3)
RESNEXT = lambda: ResNeXtBottleneck(16, 4, groups=4, base_width=8, base_channels=4)  # noqa: E731


@pytest.mark.parametrize(('make', 'channels', 'convs', 'hidden', 'groups', 'dilation'), [
    (lambda: BasicBlock(8, 8), 8, 2, 4, 1, 1), (lambda: Bottleneck(16, 4), 16, 3, 2, 1, 1),
    (lambda: Bottleneck(16, 4, dilation=2), 16, 3, 2, 1, 2), (RESNEXT, 16, 3, 16, 2, 1),
], ids=['basic', 'bottleneck', 'dilated', 'resnext'])
def test_equation_of_convolutions(build, fused, unit, make, channels, convs, hidden, groups, dilation):
    net, x = build(make, SLIM), torch.randn(2, channels, 6, 6)
    out = x
    for i in range(convs):
        weight, last = fused(net, f'conv{i + 1}.weight'), i == convs - 1
        grouped, spread = (groups, dilation) if i == 1 else (1, 1)
        weight = weight if last else weight[:hidden]
        weight = weight if i == 0 or grouped > 1 else weight[:, :hidden]
        weight = unit(weight) * (1 if last else 2 ** 0.5)
        out = F.conv2d(out, weight, padding=spread * (weight.shape[-1] // 2), dilation=spread, groups=grouped)
        out = out if last else out.clamp(min=0)
    torch.testing.assert_close(net.blocks[1](x), x + net.blocks[1].scale[:, None, None] * out)
    assert [type(module) for module in materialize(net).blocks[1].convs] == [nn.Conv2d] * convs


@pytest.mark.parametrize('make', [lambda: BasicBlock(8, 8), lambda: Bottleneck(16, 4), RESNEXT])
def test_gradients_through_the_lengths_are_those_of_normalize(make):
    operator, template = SlimBlock(width=0.5), SlimBlock(width=0.5).template(make())
    given = [torch.randn(weight.shape, dtype=torch.float64) for weight in template.parameters()]
    given[0][0] = 0  # a channel without weights
    scale = torch.randn(given[-1].shape[0], dtype=torch.float64)
    weights = [weight.requires_grad_() for weight in (*given, scale)]
    made = list(operator.weights(template, dict(enumerate(given)), dict(scale=scale)).values())
    *hidden, last = (F.normalize(weight.flatten(1), dim=1, eps=1e-19).view_as(weight) for weight in given)
    expected = [2 ** 0.5 * weight for weight in hidden] + [scale.view(-1, 1, 1, 1) * last]
    grads = [torch.randn_like(weight) for weight in made]
    for mine, others in ((made, expected), *[[torch.autograd.grad(each, weights, grads) for each in (made, expected)]]):
        for one, other in zip(mine, others, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(('make', 'shape', 'args', 'fc1', 'fc2', 'hidden'), [
    (lambda: Block(8, 2, init_values=0.1), (2, 5, 8), (), 'mlp.fc1', 'mlp.fc2', 16),
    (lambda: SwinBlock(8, 2, 16, window_size=2), (2, 16, 8), ((4, 4),), 'ffn.layers.0.0', 'ffn.layers.1', 8),
], ids=['vit', 'swin'])
def test_equation_of_attention(build, fused, make, shape, args, fc1, fc2, hidden):
    net, x = build(make, SLIM), torch.randn(shape)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    normed = (x - mean) / (var + net.blocks[0].norm2.eps).sqrt() * fused(net, 'norm2.weight') + fused(net, 'norm2.bias')
    out = normed @ fused(net, f'{fc1}.weight')[:hidden].T + fused(net, f'{fc1}.bias')[:hidden]
    out = out * 0.5 * (1 + torch.erf(out / 2 ** 0.5))
    expected = x + net.blocks[1].scale * (out @ fused(net, f'{fc2}.weight')[:, :hidden].T)
    torch.testing.assert_close(net.blocks[1](x, *args), expected)


@pytest.mark.parametrize(('width', 'hidden'), [(1, 4), (0.5, 2), (0.01, 1), (0.75, 3)])
def test_width_is_a_part_of_the_hidden_channels_and_never_none(build, width, hidden):
    net = build(lambda: Bottleneck(16, 4), dict(SLIM, width=width))
    shapes = [tuple(p.shape) for p in materialize(net).blocks[1].parameters()]
    assert shapes == [(hidden, 16, 1, 1), (hidden, hidden, 3, 3), (16, hidden, 1, 1)]


def test_whole_groups_stay(build):
    net = build(RESNEXT, dict(SLIM, width=0.3))  # 32 hidden channels in 4 groups of 8
    conv = materialize(net).blocks[1].convs[1]
    assert (conv.in_channels, conv.out_channels, conv.groups) == (8, 8, 1)


@pytest.mark.parametrize(('make', 'shape', 'part', 'kept'), [
    (lambda: Bottleneck(128, 32), (128, 12, 12), (8 * 0.25 + 9 * 0.25 ** 2) / 17, 128 + 2 * 8),
    (lambda: BasicBlock(32, 32), (32, 12, 12), 0.25, 32 + 8),
    (lambda: Block(32, 2), (10, 32), 2 / 3 * 0.25, 32 + 32 + 2 * 32 + 2),  # the norm, and its statistics
], ids=['bottleneck', 'basic', 'vit'])
def test_costs_and_keeps_what_its_docstring_says(build, saved_per_position, make, shape, part, kept):
    slim, block = (build(make, operator).blocks[1] for operator in (dict(SLIM, width=0.25), None))
    x = torch.randn(1, *shape)
    with torch.no_grad():
        flops, whole = count_flops(lambda: slim(x)), count_flops(lambda: block(x))
    whole = 2 * 10 * 12 * 32 ** 2 if len(shape) == 2 else whole  # apart from attention itself
    assert flops / whole == pytest.approx(part)
    assert saved_per_position(slim, *shape) == kept


@pytest.mark.parametrize('make', [
    lambda: Bottle2neck(32, 8, scales=2, base_width=4, base_channels=8),
    lambda: TimmBottleneck(16, 4, attn_layer=SEModule),  # its 1×1 convolutions run on the mean of the map
], ids=['parallel', 'squeeze_and_excitation'])
def test_refuses_other_convolutions_and_names_what_fits(make):
    reason = SlimBlock().why_not(make())
    assert reason.startswith('SlimBlock can\'t stand for a Bottle')
    assert reason.endswith(': its residual branch is more than ordinary convolutions in a row; '
                           'what fits: Skip, FullBlock')
