"""Light operators: the equations, the identity at scale 0, gradients, costs, and how they live in a model."""
import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones.detectors_resnet import Bottleneck as DetectorsBottleneck
from mmdet.models.backbones.res2net import Bottle2neck
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.resnext import Bottleneck as ResNeXtBottleneck
from mmdet.models.backbones.swin import SwinBlock
from timm.layers import SEModule
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from rl_mmdet.analysis import saved_bytes
from rl_mmdet.replacement import ComputingLayer, PooledBlock, adapt_state_dict, materialize, replace_blocks_
from rl_mmdet.replacement.operators import DepthwiseBlock, FullBlock, SlimBlock

DEPTHWISE = dict(type='DepthwiseBlock', scale=0.3)
SLIM = dict(type='SlimBlock', width=0.5, scale=0.3)
POOLED = dict(type='PooledBlock', stride=2, scale=0.7)


class Net(nn.Module):
    """Three equal blocks in a row; what else a block is given comes with the call."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(build() for _ in range(3))

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *args)
        return x


def with_args(*shape: int, args: tuple = ()) -> tuple[Tensor, tuple]:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)), args


CONVOLUTIONS = {
    'basic': (lambda: BasicBlock(8, 8), with_args(2, 8, 6, 6)),
    'bottleneck': (lambda: Bottleneck(16, 4), with_args(2, 16, 6, 6)),
    'dilated': (lambda: Bottleneck(16, 4, dilation=2), with_args(2, 16, 6, 6)),
    'resnext': (lambda: ResNeXtBottleneck(16, 4, groups=4, base_width=8, base_channels=4), with_args(2, 16, 6, 6)),
}
ATTENTION = {
    'vit': (lambda: Block(8, 2, init_values=0.1), with_args(2, 5, 8)),
    'timm_swin': (lambda: SwinTransformerBlock(8, (4, 4), num_heads=2, window_size=2), with_args(2, 4, 4, 8)),
    'swin': (lambda: SwinBlock(8, 2, 16, window_size=2), with_args(2, 16, 8, args=((4, 4),))),
}
BLOCKS = CONVOLUTIONS | ATTENTION
FITTING = [(name, operator) for name in CONVOLUTIONS for operator in (DEPTHWISE, SLIM, POOLED)]
FITTING += [(name, SLIM) for name in ATTENTION]
fitting = pytest.mark.parametrize(('name', 'operator'), FITTING, ids=[f'{n}-{o["type"]}' for n, o in FITTING])
ONE_EACH = [('bottleneck', DEPTHWISE), ('bottleneck', SLIM), ('bottleneck', POOLED), ('swin', SLIM)]
one_each = pytest.mark.parametrize(('name', 'operator'), ONE_EACH, ids=[f'{n}-{o["type"]}' for n, o in ONE_EACH])


@pytest.fixture
def build(randomise_) -> Callable[..., Net]:
    """Three blocks called ``name`` with random weights, the middle one replaced unless ``operator`` is None."""
    def make(name: str | Callable, operator: dict | None, mode: str = 'detached', fusion: Any = None) -> Net:
        torch.manual_seed(0)
        net = Net(BLOCKS[name][0] if isinstance(name, str) else name)
        if operator is not None:
            replace(net, operator, mode, fusion)
        values = {n: p.detach().clone() for n, p in net.named_parameters() if n.endswith('scale')}
        randomise_(net).eval()
        for slot, value in values.items():  # a known γ, not the same for all channels
            net.get_parameter(slot).data.copy_(value * torch.linspace(0.5, 1.5, len(value)))
        return net
    return make


def replace(net: Net, operator: dict, mode: str = 'detached', fusion: Any = None) -> None:
    replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'blocks': [1]}), fusion=fusion, operator=operator,
                              gradient=dict(mode=mode)))


def features(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, args = BLOCKS[name][1]
    return x.to(dtype), *args


def fused(net: Net, tensor: str) -> Tensor:
    """a·θ_p + b·θ_n, from the kept blocks themselves."""
    a, b = net.blocks[1].coeff.detach()
    return a * net.blocks[0].get_parameter(tensor).detach() + b * net.blocks[2].get_parameter(tensor).detach()


def unit(kernel: Tensor) -> Tensor:
    return torch.stack([part / part.square().sum().sqrt() for part in kernel])


# Equations

@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_depthwise_equation(build, name):
    net, (x,) = build(name, DEPTHWISE), features(name)
    weight = fused(net, 'conv2.weight')
    kernel, dilation = unit(weight.sum(1) / weight.shape[1]), 2 if name == 'dilated' else 1
    channels, given = x.shape[1], len(weight)
    expected = torch.stack([x[:, c] + net.blocks[1].scale[c] * F.conv2d(
        x[:, c:c + 1], kernel[c * given // channels][None, None], padding=dilation, dilation=dilation)[:, 0]
        for c in range(channels)], 1)
    torch.testing.assert_close(net.blocks[1](x), expected)


@pytest.mark.parametrize(('name', 'names', 'hidden', 'groups'), [
    ('basic', ('conv1', 'conv2'), 4, 1),
    ('bottleneck', ('conv1', 'conv2', 'conv3'), 2, 1),
    ('dilated', ('conv1', 'conv2', 'conv3'), 2, 1),
    ('resnext', ('conv1', 'conv2', 'conv3'), 16, 2),
])
def test_slim_equation_of_convolutions(build, name, names, hidden, groups):
    net, (x,) = build(name, SLIM), features(name)
    out = x
    for i, conv in enumerate(names):
        weight, last = fused(net, f'{conv}.weight'), i == len(names) - 1
        grouped = groups if conv == 'conv2' else 1
        weight = weight if last else weight[:hidden]
        weight = weight if i == 0 or grouped > 1 else weight[:, :hidden]
        weight = unit(weight) * (1 if last else 2 ** 0.5)
        dilation = 2 if (name, conv) == ('dilated', 'conv2') else 1
        out = F.conv2d(out, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation, groups=grouped)
        out = out if last else out.clamp(min=0)
    torch.testing.assert_close(net.blocks[1](x), x + net.blocks[1].scale[:, None, None] * out)


@pytest.mark.parametrize(('name', 'fc1', 'fc2', 'hidden'), [
    ('vit', 'mlp.fc1', 'mlp.fc2', 16),
    ('timm_swin', 'mlp.fc1', 'mlp.fc2', 16),
    ('swin', 'ffn.layers.0.0', 'ffn.layers.1', 8),
])
def test_slim_equation_of_attention(build, name, fc1, fc2, hidden):
    net, (x, *args) = build(name, SLIM), features(name)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    normed = (x - mean) / (var + net.blocks[0].norm2.eps).sqrt() * fused(net, 'norm2.weight') + fused(net, 'norm2.bias')
    out = normed @ fused(net, f'{fc1}.weight')[:hidden].T + fused(net, f'{fc1}.bias')[:hidden]
    out = out * 0.5 * (1 + torch.erf(out / 2 ** 0.5))
    expected = x + net.blocks[1].scale * (out @ fused(net, f'{fc2}.weight')[:, :hidden].T)
    torch.testing.assert_close(net.blocks[1](x, *args), expected)


@pytest.mark.parametrize('size', [(6, 6), (5, 7)], ids=['divides', 'divides_not'])
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_pooled_equation(build, name, size):
    net = build(name, POOLED)
    x = torch.randn(2, BLOCKS[name][1][0].shape[1], *size)
    whole = build(name, dict(type='FullBlock'))
    whole.load_state_dict({key: value for key, value in net.state_dict().items() if not key.endswith('scale')})
    rows, columns = ([slice(i, min(i + 2, n)) for i in range(0, n, 2)] for n in size)
    coarse = torch.stack([torch.stack([x[..., r, c].mean((2, 3)) for c in columns], 2) for r in rows], 2)
    change = F.interpolate(whole.blocks[1](coarse) - coarse, size=size, mode='bilinear')
    torch.testing.assert_close(net.blocks[1](x), x + net.blocks[1].scale[:, None, None] * change)


def test_depthwise_is_indifferent_to_the_scale_of_the_kept_weights(build):
    net, (x,) = build('bottleneck', DEPTHWISE), features('bottleneck')
    expected = net.blocks[1](x)
    for block in (net.blocks[0], net.blocks[2]):
        block.conv2.weight.data.mul_(7)
    torch.testing.assert_close(net.blocks[1](x), expected)


@fitting
def test_scale_zero_is_exactly_the_identity(build, name, operator):
    net = build(name, dict(operator, scale=0))
    for mode in (True, False):
        net.train(mode)
        assert torch.equal(net.blocks[1](*features(name)), features(name)[0])


@fitting
def test_scale_starts_as_given_per_channel(name, operator):
    net = Net(BLOCKS[name][0])
    replace(net, operator)
    channels = features(name)[0].shape[1 if name in CONVOLUTIONS else -1]
    assert net.blocks[1].scale.tolist() == pytest.approx([operator['scale']] * channels)


@pytest.mark.parametrize(('width', 'hidden'), [(1, 4), (0.5, 2), (0.01, 1), (0.75, 3)])
def test_slim_width_is_a_part_of_the_hidden_channels_and_never_none(build, width, hidden):
    net = build('bottleneck', dict(SLIM, width=width))
    shapes = [tuple(p.shape) for p in materialize(net).blocks[1].parameters()]
    assert shapes == [(hidden, 16, 1, 1), (hidden, hidden, 3, 3), (16, hidden, 1, 1)]


def test_slim_keeps_whole_groups(build):
    net = build('resnext', dict(SLIM, width=0.3))  # 32 hidden channels in 4 groups of 8
    conv = materialize(net).blocks[1].convs[1]
    assert (conv.in_channels, conv.out_channels, conv.groups) == (8, 8, 1)


# Who fits

@pytest.mark.parametrize('operator', [DepthwiseBlock(), PooledBlock()])
@pytest.mark.parametrize('name', ATTENTION)
def test_why_not_attention_names_what_fits(operator, name):
    kind = type(operator).__name__
    reason = operator.why_not(BLOCKS[name][0]())
    assert reason.startswith(f'{kind} can\'t stand for a ')
    assert reason.endswith('it has no convolution; what fits: SlimBlock, FullBlock')


@fitting
def test_why_not_is_none_where_it_fits(name, operator):
    kind = {cls.__name__: cls for cls in (DepthwiseBlock, SlimBlock, PooledBlock)}[operator['type']]
    assert kind().why_not(BLOCKS[name][0]()) is None


def test_why_not_slim_for_parallel_convolutions_names_the_others():
    block = Bottle2neck(32, 8, scales=2, base_width=4, base_channels=8)
    assert SlimBlock().why_not(block) == (
        'SlimBlock can\'t stand for a Bottle2neck: its residual branch is more than ordinary convolutions in a row; '
        'what fits: DepthwiseBlock, PooledBlock, FullBlock')


def test_why_not_slim_for_squeeze_and_excitation():
    block = TimmBottleneck(16, 4, attn_layer=SEModule)  # its 1×1 convolutions run on the mean of the map
    assert 'more than ordinary convolutions in a row' in (SlimBlock().why_not(block) or 'it fits')


@pytest.mark.parametrize('operator', [DepthwiseBlock(), SlimBlock(), PooledBlock()])
@pytest.mark.parametrize('block', [
    lambda: Bottleneck(16, 4, stride=2, downsample=nn.Conv2d(16, 16, 1, 2)),
    lambda: Bottleneck(8, 4, downsample=nn.Conv2d(8, 16, 1)),
    lambda: BasicBlock(4, 8, downsample=nn.Conv2d(4, 8, 1)),
], ids=['stride', 'width', 'basic'])
def test_why_not_change_of_stride_or_width(operator, block):
    reason = operator.why_not(block())
    assert reason.endswith(': it changes the width or the stride; what fits: FullBlock')


@pytest.mark.parametrize('operator', [DepthwiseBlock(), SlimBlock(), PooledBlock()])
def test_why_not_another_way_forward(operator):
    reason = operator.why_not(DetectorsBottleneck(16, 4, rfp_inplanes=4))
    assert reason.endswith('a Bottleneck, which its backbone also runs by rfp_forward(); FullBlock can')


def test_full_block_always_fits():
    assert FullBlock().why_not(DetectorsBottleneck(16, 4)) is None


def test_why_not_even_kernel_of_depthwise():
    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 1)

    assert 'conv1 has a kernel of even size; what fits: PooledBlock, FullBlock' in DepthwiseBlock().why_not(Even())


def test_replacing_an_unfit_block_raises_and_leaves_the_model(snapshot):
    net = Net(BLOCKS['vit'][0])
    before = snapshot(net)
    with pytest.raises(ValueError, match='DepthwiseBlock can\'t stand for a Block: it has no convolution'):
        replace(net, DEPTHWISE)
    after = snapshot(net)
    assert after[0] == before[0]
    assert list(after[1]) == list(before[1])


@pytest.mark.parametrize(('operator', 'message'), [
    (dict(type='DepthwiseBlock', scale='1'), "DepthwiseBlock: scale must be a finite number, got '1'"),
    (dict(type='SlimBlock', scale=float('nan')), 'SlimBlock: scale must be a finite number, got nan'),
    (dict(type='PooledBlock', scale=True), 'PooledBlock: scale must be a finite number, got True'),
    (dict(type='SlimBlock', width=0), 'SlimBlock: width must be above 0 and at most 1, got 0'),
    (dict(type='SlimBlock', width=1.01), 'SlimBlock: width must be above 0 and at most 1, got 1.01'),
    (dict(type='SlimBlock', width='a'), "SlimBlock: width must be above 0 and at most 1, got 'a'"),
    (dict(type='PooledBlock', stride=1), 'PooledBlock: stride must be an integer of at least 2, got 1'),
    (dict(type='PooledBlock', stride=2.0), 'PooledBlock: stride must be an integer of at least 2, got 2.0'),
    (dict(type='DepthwiseBlock', size=1), 'size'),
])
def test_wrong_arguments_raise(operator, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        replace(Net(BLOCKS['bottleneck'][0]), operator)


# Gradients

@fitting
def test_gradients_of_coeff_scale_and_input(build, name, operator):
    layer = build(name, operator).double().blocks[1]
    x, *args = features(name, torch.float64)
    x = x[:1, ..., :4, :4] if name in CONVOLUTIONS else x[:1]

    def run(coeff: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        return functional_call(layer, {'coeff': coeff, 'scale': scale}, (x, *args))

    given = layer.coeff.detach().clone(), layer.scale.detach().clone(), x.clone()
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in given], fast_mode=True)


@pytest.mark.parametrize('fusion', [dict(type='ChannelFusion'), dict(type='TransformFusion', rank=1)],
                         ids=['channel', 'transform'])
@one_each
def test_gradients_of_other_fusions(build, name, operator, fusion):
    layer = build(name, operator, fusion=fusion).double().blocks[1]
    names = [key for key, _ in layer.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), features(name, torch.float64))

    given = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, given, fast_mode=True)


@fitting
def test_gradient_reaches_kept_blocks_only_if_coupled(build, name, operator):
    for mode in ('detached', 'coupled'):
        net = build(name, operator, mode)
        net.blocks[1](*features(name)).square().sum().backward()
        reached = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        own = {'blocks.1.coeff', 'blocks.1.scale'}
        needed = {f'blocks.{i}.{n}' for i in (0, 2) for n in net.blocks[1].sources}
        assert reached == (own if mode == 'detached' else own | needed), mode


@one_each
def test_gradients_of_kept_blocks_if_coupled(build, name, operator):
    net = build(name, operator, 'coupled').double()
    names = [f'blocks.{i}.{n}' for i in (0, 2) for n in list(net.blocks[1].sources)[:2]]

    def run(*values: Tensor) -> Tensor:
        return functional_call(net, dict(zip(names, values, strict=True)), features(name, torch.float64))

    given = [net.get_parameter(n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, given, fast_mode=True)


@fitting
def test_scale_zero_learns_the_scale_first_and_the_fusion_afterwards(build, name, operator):
    layer = build(name, dict(operator, scale=0)).blocks[1]
    for step in range(2):
        layer.zero_grad()
        layer(*features(name)).square().sum().backward()
        assert layer.scale.grad.any()
        assert bool(layer.coeff.grad.any()) == (step == 1)
        layer.scale.data.sub_(0.01 * layer.scale.grad)


# Materialized

@fitting
@pytest.mark.parametrize('train', [False, True])
def test_materialized_has_the_same_outputs(build, name, operator, train):
    net = build(name, operator)
    plain = materialize(net)
    outs = [model.train(train)(*features(name)) for model in (net, plain)]
    torch.testing.assert_close(outs[1], outs[0])


@fitting
def test_materialized_is_ordinary_layers_with_weights_of_their_own(build, name, operator):
    net = build(name, operator)
    plain = materialize(net)
    assert not any(isinstance(module, ComputingLayer) for module in plain.modules())
    assert not [key for key in plain.state_dict() if 'coeff' in key]
    tensors = [*plain.parameters(), *net.parameters()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    kinds = {type(module) for module in plain.blocks[1].modules()}
    if operator is DEPTHWISE:
        assert kinds == {nn.Conv2d}
    if operator is SLIM and name in CONVOLUTIONS:
        assert [type(module) for module in plain.blocks[1].convs] == [nn.Conv2d] * (2 if name == 'basic' else 3)


@one_each
def test_materialized_can_be_cast_saved_copied_and_trained(build, name, operator):
    plain = materialize(build(name, operator))
    expected = plain(*features(name))
    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain)), copy.deepcopy(plain).double()):
        x, *args = features(name)
        x = x.to(next(twin.parameters()).dtype)
        torch.testing.assert_close(twin(x, *args).float(), expected)
        twin(x, *args).sum().backward()
        assert all(p.grad is not None for p in twin.blocks[1].parameters())


# What is learned, and what it costs

@fitting
def test_learned_are_the_fusions_numbers_and_a_scale_per_channel(build, name, operator):
    layer = build(name, operator).blocks[1]
    channels = features(name)[0].shape[1 if name in CONVOLUTIONS else -1]
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {'coeff': (2,), 'scale': (channels,)}


@pytest.mark.parametrize(('name', 'operator', 'pairs'), [
    ('bottleneck', DEPTHWISE, 4), ('bottleneck', SLIM, 2 + 2 + 16), ('bottleneck', POOLED, 4 + 4 + 16 + 6),
    ('basic', SLIM, 4 + 8), ('vit', SLIM, 2 + 16 + 1 + 8)])
def test_learned_with_channel_fusion_are_pairs_of_what_is_needed(build, name, operator, pairs):
    layer = build(name, operator, fusion=dict(type='ChannelFusion')).blocks[1]
    assert tuple(layer.coeff.shape) == (2, pairs)


WIDE = {
    'basic': lambda: BasicBlock(32, 32),
    'bottleneck': lambda: Bottleneck(128, 32),
    'vit': lambda: Block(32, 2),
}
C, M, P = 128, 32 // 4, 12 * 12  # channels of the wide bottleneck, its slim hidden channels, positions


def flops(layer: nn.Module, *args: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(*args)
    return counter.get_total_flops()


def wide(build, name: str, operator: dict) -> nn.Module:
    return build(WIDE[name], operator).blocks[1]


def test_flops_of_depthwise():
    net = Net(WIDE['bottleneck'])
    x = torch.randn(1, C, 12, 12)
    assert flops(net.blocks[1], x) == 34 * 32 ** 2 * P
    replace(net, DEPTHWISE)
    assert flops(net.blocks[1], x) == 2 * 9 * C * P


def test_flops_of_slim_convolutions(build):
    x = torch.randn(1, C, 12, 12)
    slim = flops(wide(build, 'bottleneck', dict(SLIM, width=0.25)), x)
    assert slim == 2 * P * (C * M + 9 * M * M + M * C)
    assert slim / flops(Bottleneck(128, 32), x) == pytest.approx((8 * 0.25 + 9 * 0.25 ** 2) / 17)
    x = torch.randn(1, 32, 12, 12)
    assert flops(wide(build, 'basic', dict(SLIM, width=0.25)), x) / flops(BasicBlock(32, 32), x) == pytest.approx(0.25)


def test_flops_of_slim_attention(build):
    x = torch.randn(1, 10, 32)
    slim = flops(wide(build, 'vit', dict(SLIM, width=0.25)), x)
    assert slim == 2 * 10 * 2 * 32 * 32
    assert slim / (2 * 10 * 12 * 32 ** 2) == pytest.approx(2 * 0.25 / 3)


@pytest.mark.parametrize('stride', [2, 3])
def test_flops_of_pooled(build, stride):
    x = torch.randn(1, C, 12, 12)
    pooled = flops(wide(build, 'bottleneck', dict(POOLED, stride=stride)), x)
    assert pooled * stride ** 2 == flops(Bottleneck(128, 32), x)


def numbers_saved_per_position(layer: nn.Module, *shape: int) -> float:
    """What twice as many positions save more: float32 numbers, the input included, weights excluded."""
    counts = []
    for batch in (1, 2):
        x = torch.randn(batch, *shape, requires_grad=True)
        counts.append(saved_bytes(layer, lambda x=x: layer(x)))
    positions = shape[-1] * shape[-2] if len(shape) == 3 else shape[0]
    return (counts[1] - counts[0]) / 4 / positions


def test_saved_by_depthwise_is_its_input(build):
    assert numbers_saved_per_position(wide(build, 'bottleneck', DEPTHWISE), C, 12, 12) == C


def test_saved_by_slim_convolutions_is_its_input_and_the_thin_activations(build):
    layer = wide(build, 'bottleneck', dict(SLIM, width=0.25))
    assert numbers_saved_per_position(layer, C, 12, 12) == C + 2 * M


def test_saved_by_slim_attention_is_its_input_the_norm_and_the_thin_activations(build):
    layer = wide(build, 'vit', dict(SLIM, width=0.25))
    statistics = 2  # of the norm
    assert numbers_saved_per_position(layer, 10, 32) == 32 + 32 + 2 * 32 + statistics


@pytest.mark.parametrize('stride', [2, 3])
def test_saved_by_pooled_is_its_input_and_a_part_of_what_the_block_saves(build, stride):
    whole = numbers_saved_per_position(wide(build, 'bottleneck', dict(type='FullBlock')), C, 12, 12)
    pooled = numbers_saved_per_position(wide(build, 'bottleneck', dict(POOLED, stride=stride)), C, 12, 12)
    assert pooled == pytest.approx(C + (whole + C) / stride ** 2)  # the change, too, for γ


# In a model

@fitting
def test_state_dict_round_trip_restores_outputs(build, randomise_, name, operator):
    source, target = build(name, operator), randomise_(build(name, operator), seed=9)
    assert not torch.allclose(source(*features(name)), target(*features(name)))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(*features(name)), target(*features(name)))


@fitting
def test_baselines_state_dict_is_used_without_rest(build, name, operator):
    net, baseline = build(name, operator), build(name, None).state_dict()
    adapted, report = adapt_state_dict(net, baseline)
    assert (report.missing, report.left_over, report.mismatched) == ([], [], {})
    assert list(report.fits) == ['blocks.1']
    assert adapted['blocks.1.scale'].tolist() == pytest.approx([operator['scale']] * len(net.blocks[1].scale))
    result = net.load_state_dict(baseline)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


@fitting
def test_own_state_dict_passes_unchanged(build, name, operator, assert_same_state):
    own = build(name, operator).state_dict()
    adapted, report = adapt_state_dict(build(name, operator), own)
    assert_same_state(adapted, own)
    assert (report.missing, report.left_over, report.fits) == ([], [], {})


@pytest.mark.parametrize('operator', [DEPTHWISE, SLIM])
def test_norm_statistics_of_the_removed_block_are_gone(build, operator):
    net = build('bottleneck', operator)
    assert list(net.blocks[1].state_dict()) == ['coeff', 'scale']
    net.load_state_dict(build('bottleneck', None).state_dict())
    assert not list(net.blocks[1].buffers())


def test_norm_statistics_of_pooled_stay(build):
    buffers = dict(build('bottleneck', POOLED).blocks[1].named_buffers())
    assert list(buffers) == list(dict(build('bottleneck', None).blocks[1].named_buffers()))


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
                         ids=['deepcopy', 'pickle'])
@one_each
def test_duplicate_points_into_itself(build, duplicate, name, operator):
    net = build(name, operator)
    twin = duplicate(net)
    expected = net(*features(name))
    assert twin.blocks[1].before is twin.blocks[0]
    assert twin.blocks[1].after is twin.blocks[2]
    for parameter in net.parameters():
        parameter.data.mul_(-2)
    for buffer in net.buffers():
        buffer.data.add_(1)
    assert torch.equal(twin(*features(name)), expected)
    twin.blocks[0].load_state_dict(net.blocks[0].state_dict())
    assert not torch.allclose(twin.blocks[1](*features(name)), net.blocks[1](*features(name)))


@one_each
def test_duplicate_follows_its_own_neighbours(build, name, operator):
    twin = copy.deepcopy(build(name, operator))
    before = twin.blocks[1](*features(name))
    for parameter in twin.blocks[2].parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    assert not torch.allclose(twin.blocks[1](*features(name)), before)


@pytest.mark.parametrize('operator', [DEPTHWISE, SLIM, POOLED])
@pytest.mark.parametrize('mode', ['detached', 'coupled'])
def test_checkpointed_has_equal_outputs_and_gradients(build, operator, mode):
    nets = [build(lambda with_cp=with_cp: Bottleneck(16, 4, with_cp=with_cp), operator, mode)
            for with_cp in (False, True)]
    assert nets[1].blocks[1].checkpointed
    for net in nets:
        net(features('bottleneck')[0].clone().requires_grad_()).square().mean().backward()
    for (name, plain), again in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(again.grad, plain.grad, msg=name)


@fitting
def test_autocast_is_near_and_gradients_are_float32(build, name, operator):
    nets = build(name, operator), build(name, operator)
    expected = nets[0](*features(name))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = nets[1](*features(name))
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()
    expected.square().mean().backward()
    actual.float().square().mean().backward()
    for slot in ('coeff', 'scale'):
        one, other = (net.blocks[1].get_parameter(slot).grad for net in nets)
        assert other.dtype == torch.float32
        assert (one - other).norm() < 0.1 * one.norm()


@one_each
def test_compile_fullgraph_equals_eager(build, name, operator):
    nets = build(name, operator), build(name, operator)
    torch._dynamo.reset()
    compiled = torch.compile(nets[1].blocks[1], backend='eager', fullgraph=True)
    outs = nets[0].blocks[1](*features(name)), compiled(*features(name))
    torch.testing.assert_close(outs[1], outs[0])
    for out in outs:
        out.square().mean().backward()
    for slot in ('coeff', 'scale'):
        one, other = (net.blocks[1].get_parameter(slot).grad for net in nets)
        torch.testing.assert_close(other, one)


@one_each
def test_train_and_eval_reach_what_runs(build, name, operator):
    net = build(name, operator)
    for mode in (True, False):
        net.train(mode)
        layer = net.blocks[1]
        assert {module.training for module in [layer.template, *layer.modules()]} == {mode}


def test_pooled_norms_move_in_train_mode_only(build):
    net, (x,) = build('bottleneck', POOLED), features('bottleneck')
    layer = net.blocks[1]
    for mode in (False, True):
        before = layer.bn1.running_mean.clone()
        net.train(mode)(x)
        assert torch.equal(layer.bn1.running_mean, before) != mode


def test_pooled_norm_in_eval_mode_alone_stays_as_it_is(build):
    net, (x,) = build('bottleneck', POOLED), features('bottleneck')
    net.train()
    net.blocks[1].bn1.eval()  # as norm_eval=True does
    before = net.blocks[1].bn1.running_mean.clone()
    net(x)
    assert torch.equal(net.blocks[1].bn1.running_mean, before)


@fitting
def test_cast_to_double_leaves_outputs_equal(build, name, operator):
    net = build(name, operator)
    expected = net(*features(name))
    actual = net.double()(*features(name, torch.float64))
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.float(), expected, rtol=1e-4, atol=1e-4)


@one_each
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_cast_to_half_is_near(build, name, operator, dtype):
    net = build(name, operator)
    expected = net(*features(name))
    actual = net.to(dtype)(*features(name, dtype))
    assert actual.dtype == dtype
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('operator', [DEPTHWISE, SLIM])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_kernel_of_zeros_is_the_identity(build, operator, dtype):
    net = build('bottleneck', operator).to(dtype)
    net.blocks[1].coeff.data.zero_()
    (x,) = features('bottleneck', dtype)
    assert torch.equal(net.blocks[1](x), x)


def test_repr_names_the_settings(build):
    assert 'DepthwiseBlock(scale=0.3)' in repr(build('bottleneck', DEPTHWISE).blocks[1])
    assert 'SlimBlock(width=0.5, scale=0.3)' in repr(build('bottleneck', SLIM).blocks[1])
    assert 'PooledBlock(stride=2, scale=0.7)' in repr(build('bottleneck', POOLED).blocks[1])
