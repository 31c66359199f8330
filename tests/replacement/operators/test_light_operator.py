"""Light operators: the identity at scale 0, gradients, who fits, and how they live in a model."""
import copy
import pickle
import re

import pytest
import torch
from mmdet.models.backbones.detectors_resnet import Bottleneck as DetectorsBottleneck
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.swin import SwinBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.func import functional_call

from rl_mmdet.replacement import ComputingLayer, adapt_state_dict, materialize
from rl_mmdet.replacement.operators import FullBlock, Skip, SlimBlock

SLIM = dict(type='SlimBlock', width=0.5, scale=0.3)
BLOCKS = {
    'bottleneck': (lambda: Bottleneck(16, 4), (2, 16, 6, 6), ()),
    'vit': (lambda: Block(8, 2, init_values=0.1), (2, 5, 8), ()),
    'swin': (lambda: SwinBlock(8, 2, 16, window_size=2), (2, 16, 8), ((4, 4),)),
}
every_block = pytest.mark.parametrize('name', BLOCKS)
computes_half = pytest.mark.skipif(torch.__version__ < (2, 3), reason='before torch 2.3 no CPU computes in float16')


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    _, shape, args = BLOCKS[name]
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype), *args


@pytest.fixture
def make(build):
    return lambda name, *args, **settings: build(BLOCKS[name][0], *args, **settings)


@every_block
def test_scale_zero_is_the_identity_and_learns_the_scale_first(make, name):
    layer = make(name, dict(SLIM, scale=0)).blocks[1]
    assert torch.equal(layer(*inputs(name)), inputs(name)[0])
    for step in range(2):
        layer.zero_grad()
        layer(*inputs(name)).square().sum().backward()
        assert layer.scale.grad.any()
        assert bool(layer.coeff.grad.any()) == (step == 1)
        layer.scale.data.sub_(0.01 * layer.scale.grad)


@pytest.mark.parametrize('dtype', [torch.float32, pytest.param(torch.float16, marks=computes_half)])
def test_kernels_of_zeros_are_the_identity(make, dtype):
    net = make('bottleneck', SLIM).to(dtype)
    net.blocks[1].coeff.data.zero_()
    x, = inputs('bottleneck', dtype)
    assert torch.equal(net.blocks[1](x), x)


def test_channels_that_are_zero_in_all_kept_blocks_have_finite_gradients(make):
    net = make('bottleneck', SLIM)
    for block in (net.blocks[0], net.blocks[2]):
        for conv in (block.conv1, block.conv2, block.conv3):
            conv.weight.data[0] = 0
    (2. ** 16 * net.blocks[1](*inputs('bottleneck')).square().sum()).backward()
    assert net.blocks[1].coeff.grad.isfinite().all() and net.blocks[1].coeff.grad.any()


# Who fits

@pytest.mark.parametrize('operator', [Skip(), SlimBlock()])
@pytest.mark.parametrize(('block', 'reason'), [
    (lambda: Bottleneck(16, 4, stride=2, downsample=nn.Conv2d(16, 16, 1, 2)),
     ': it changes the width or the stride; what fits: FullBlock'),
    (lambda: BasicBlock(4, 8, downsample=nn.Conv2d(4, 8, 1)),
     ': it changes the width or the stride; what fits: FullBlock'),
    (lambda: DetectorsBottleneck(16, 4, rfp_inplanes=4),
     'a Bottleneck, which its backbone also runs by rfp_forward(); FullBlock can'),
], ids=['stride', 'width', 'another_way_forward'])
def test_why_not(operator, block, reason):
    assert operator.why_not(block()).endswith(reason)
    assert FullBlock().why_not(block()) is None


@pytest.mark.parametrize(('operator', 'message'), [
    (dict(type='SlimBlock', scale='1'), "SlimBlock: scale must be a finite number, got '1'"),
    (dict(type='SlimBlock', scale=float('nan')), 'SlimBlock: scale must be a finite number, got nan'),
    (dict(type='SlimBlock', width=0), 'SlimBlock: width must be a number above 0 and at most 1, got 0'),
    (dict(type='SlimBlock', width=1.01), 'SlimBlock: width must be a number above 0 and at most 1, got 1.01'),
    (dict(type='SlimBlock', size=1), "SlimBlock has no argument 'size'; allowed: width, scale"),
])
def test_wrong_arguments_raise(make, operator, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make('bottleneck', operator)


# Gradients

@pytest.mark.parametrize(('name', 'fusion'), [
    *((name, 'ScalarFusion') for name in BLOCKS), ('bottleneck', 'TransformFusion')])
def test_gradients_of_all_that_learns_and_of_the_input(make, name, fusion):
    rank = dict(rank=1) if fusion == 'TransformFusion' else {}
    layer = make(name, SLIM, dict(type=fusion, **rank)).double().blocks[1]
    x, *args = inputs(name, torch.float64)
    names = [key for key, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x, *args))

    given = [value.detach().clone().requires_grad_() for value in (x, *layer.parameters())]
    assert torch.autograd.gradcheck(run, given, fast_mode=True)


@every_block
def test_gradient_reaches_what_is_used_of_kept_blocks_only_if_coupled(make, name):
    for mode in ('detached', 'coupled'):
        net = make(name, SLIM, mode=mode).double()
        needed = [f'blocks.{i}.{n}' for i in (0, 2) for n in net.blocks[1].donors]
        net.blocks[1](*inputs(name, torch.float64)).square().sum().backward()
        reached = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {'blocks.1.coeff', 'blocks.1.scale', *(needed if mode == 'coupled' else [])}, mode
    given = [net.get_parameter(n).detach().clone().requires_grad_() for n in needed[:2]]
    assert torch.autograd.gradcheck(lambda *values: functional_call(
        net, dict(zip(needed, values, strict=False)), inputs(name, torch.float64)), given, fast_mode=True)


# In a model

@every_block
def test_materialized_computes_the_same_by_ordinary_layers(make, name):
    net = make(name, SLIM)
    plain = materialize(net)
    for train in (True, False):
        expected = net.train(train)(*inputs(name))
        torch.testing.assert_close(plain.train(train)(*inputs(name)), expected)
    assert not any(isinstance(module, ComputingLayer) for module in plain.modules())
    assert not [key for key in plain.state_dict() if 'coeff' in key]
    tensors = [*plain.parameters(), *net.parameters()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        torch.testing.assert_close(twin(*inputs(name)), expected)
        twin(*inputs(name)).sum().backward()
        assert all(p.grad is not None for p in twin.blocks[1].parameters())


@pytest.mark.parametrize(('name', 'pairs'), [('bottleneck', 3), ('vit', 5)])
def test_learned_are_the_fusions_numbers_and_a_scale_per_channel(make, name, pairs):
    channels = BLOCKS[name][1][-1 if name == 'vit' else 1]
    for fusion, shape in ((None, (2,)), (dict(type='TransformFusion', share=1e-6), (2, pairs))):
        state = make(name, SLIM, fusion).blocks[1].state_dict()  # no norm's statistics are left
        assert {n: tuple(value.shape) for n, value in state.items()} == {'coeff': shape, 'scale': (channels,)}


@every_block
def test_state_dicts_of_its_own_and_of_the_baseline(make, randomise_, assert_same_state, name):
    source, target = make(name, SLIM), randomise_(make(name, SLIM), seed=9)
    adapted, report = adapt_state_dict(target, source.state_dict())
    assert_same_state(adapted, source.state_dict())
    assert (report.missing, report.left_over, report.initialised) == ([], [], [])
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(*inputs(name)), target(*inputs(name)))
    adapted, report = adapt_state_dict(target, baseline := make(name, None).state_dict())
    assert (report.missing, report.left_over, report.mismatched) == ([], [], {})
    assert report.initialised == ['blocks.1']
    assert adapted['blocks.1.scale'].tolist() == pytest.approx([SLIM['scale']] * len(target.blocks[1].scale))
    result = target.load_state_dict(baseline)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


@every_block
def test_a_copy_has_a_life_of_its_own(make, name):
    net = make(name, SLIM)
    twin, expected = copy.deepcopy(net), net(*inputs(name))
    assert twin.blocks[1].kept == (twin.blocks[0], twin.blocks[2])
    for parameter in net.parameters():
        parameter.data.mul_(-2)
    assert torch.equal(twin(*inputs(name)), expected)
    for parameter in twin.parameters():
        parameter.data.mul_(-2)
    assert torch.equal(twin(*inputs(name)), net(*inputs(name)))


@computes_half
@every_block
def test_cast_to_half_is_near(make, name):
    net = make(name, SLIM)
    expected = net(*inputs(name))
    actual = net.half()(*inputs(name, torch.float16))
    assert actual.dtype == torch.float16
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()


def test_repr_names_the_settings(make):
    assert 'SlimBlock(width=0.5, scale=0.3)' in repr(make('bottleneck', SLIM).blocks[1])
