"""Light operators in whole backbones: one step with each that fits, and one line that names what fits otherwise."""
import copy
import re
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

import rl_mmdet.models  # noqa: F401  registers the RL backbones
from rl_mmdet.replacement import computing_layers, materialize

DEPTHWISE = dict(type='DepthwiseBlock')
SLIM = dict(type='SlimBlock', width=0.5)
POOLED = dict(type='PooledBlock')
ALL = ('DepthwiseBlock', 'SlimBlock', 'PooledBlock')
BACKBONES = {
    'r50': dict(type='RLResNet', depth=50, base_channels=4),
    'r34': dict(type='RLResNet', depth=34, base_channels=4),
    'resnext': dict(type='RLResNeXt', depth=50, base_channels=4, groups=2, base_width=4),
    'res2net': dict(type='RLBackbone', backbone='Res2Net', depth=50, base_channels=8, stem_channels=8, scales=2,
                    base_width=4),
    'timm_resnet': dict(type='RLBackbone', timm='resnet50', channels=(4, 8, 8, 16)),
    'timm_convnext': dict(type='RLBackbone', timm='convnext_atto', dims=(8, 16, 16, 32), depths=(2, 2, 6, 2)),
    'swin': dict(type='RLSwin', embed_dims=8, depths=(2, 2, 6, 2), num_heads=(1, 2, 2, 4), window_size=4),
    'timm_swin': dict(type='RLBackbone', timm='swin_tiny_patch4_window7_224', embed_dim=16, num_heads=(1, 2, 2, 4)),
    'vit': dict(type='RLViT', arch=dict(embed_dim=24, num_heads=2, depth=6), img_size=64, window_size=2),
    'timm_vit': dict(type='RLBackbone', timm='vit_tiny_patch16_224', embed_dim=24, num_heads=2, depth=6),
    'detectors': dict(type='RLBackbone', backbone='DetectoRS_ResNet', depth=50, base_channels=4),
}
FITS = {
    'r50': ALL, 'r34': ALL, 'resnext': ALL, 'timm_resnet': ALL,
    'res2net': ('DepthwiseBlock', 'PooledBlock'), 'timm_convnext': ('DepthwiseBlock', 'PooledBlock'),
    'swin': ('SlimBlock',), 'timm_swin': ('SlimBlock',), 'vit': ('SlimBlock',), 'timm_vit': ('SlimBlock',),
    'detectors': (),
}
FITTING = [(name, kind) for name, kinds in FITS.items() for kind in kinds]
UNFIT = [(name, kind) for name, kinds in FITS.items() for kind in ALL if kind not in kinds]
OPERATORS = {operator['type']: operator for operator in (DEPTHWISE, SLIM, POOLED)}
fitting = pytest.mark.parametrize(('name', 'kind'), FITTING, ids=['-'.join(pair) for pair in FITTING])
norms = pytest.mark.parametrize('norm_eval', [True, False])
NORMED = [(name, kind) for name, kind in FITTING if name in ('r50', 'r34', 'resnext', 'res2net', 'timm_resnet')]


def build(name: str, kind: str, mode: str = 'detached', fusion: str = 'ScalarFusion', **more: Any) -> nn.Module:
    """The same weights at every call, every second block replaced."""
    torch.manual_seed(0)
    return MODELS.build(dict(copy.deepcopy(BACKBONES[name]), **more, replacement=dict(
        plan=dict(type='EveryKth', k=2), fusion=dict(type=fusion), operator=OPERATORS[kind], gradient=dict(mode=mode))))


def step(model: nn.Module, size: int = 64) -> None:
    """A training step's forward and backward."""
    model.train()
    outs = model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3)))
    sum(out.square().mean() for out in outs).backward()


def assert_learns(model: nn.Module) -> None:
    """Every number of a computing layer that learns has a gradient, a finite one, and those of a kind aren't all zero.

    One by one they may be: in so thin a block all ReLUs can happen to be closed.
    """
    layers = computing_layers(model)
    assert layers
    for name, layer in layers.items():
        for slot, parameter in layer.named_parameters(recurse=False):
            assert torch.isfinite(parameter.grad).all(), f'{name}.{slot}'
    for slot in ('coeff', 'scale'):
        assert any(layer.get_parameter(slot).grad.any() for layer in layers.values()), slot


@fitting
@pytest.mark.parametrize('mode', ['detached', 'coupled'])
def test_step_gives_finite_gradients(name, kind, mode, randomise_):
    model = randomise_(build(name, kind, mode))
    step(model)
    assert_learns(model)


@pytest.mark.parametrize(('name', 'kind'), [('r50', 'DepthwiseBlock'), ('r50', 'SlimBlock'), ('vit', 'SlimBlock')])
@pytest.mark.parametrize('fusion', ['ChannelFusion', 'TransformFusion'])
def test_step_with_other_fusions_gives_finite_gradients(name, kind, fusion, randomise_):
    model = randomise_(build(name, kind, fusion=fusion))
    step(model)
    assert_learns(model)


@pytest.mark.parametrize(('name', 'kind'), NORMED, ids=['-'.join(pair) for pair in NORMED])
@norms
def test_step_with_norms_that_learn_statistics_or_do_not(name, kind, norm_eval, randomise_):
    model = randomise_(build(name, kind, norm_eval=norm_eval))
    before = {key: buffer.clone() for key, buffer in model.named_buffers() if key.endswith('running_mean')}
    step(model)
    assert_learns(model)
    moved = {key for key, buffer in model.named_buffers() if key in before and not torch.equal(buffer, before[key])}
    assert moved == (set() if norm_eval else set(before))


@pytest.mark.parametrize(('name', 'kind'), [
    *NORMED, ('swin', 'SlimBlock'), ('vit', 'SlimBlock'), ('timm_vit', 'SlimBlock')],
    ids=lambda value: value)
def test_step_with_frozen_stages_leaves_these_alone(name, kind, randomise_):
    model = randomise_(build(name, kind, frozen_stages=2))
    step(model)
    assert_learns(model)
    still = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert still
    assert all(p.grad is None for n, p in model.named_parameters() if n in still)
    assert not any(layer in n for n in still for layer in computing_layers(model))


@fitting
def test_outputs_have_the_baselines_shapes_and_equal_the_materialized(name, kind, randomise_):
    model = randomise_(build(name, kind))
    plain = materialize(model)
    model.eval()
    plain.eval()
    image = torch.randn(1, 3, 64, 96)
    torch.manual_seed(0)
    baseline = MODELS.build(dict(copy.deepcopy(BACKBONES[name]), replacement=None))
    assert [out.shape for out in model(image)] == [out.shape for out in baseline(image)]
    for actual, expected in zip(model(image), plain(image), strict=True):
        size = expected.abs().max()
        torch.testing.assert_close(actual / size, expected / size, rtol=0, atol=1e-5)


@fitting
def test_baselines_checkpoint_is_used_without_rest(name, kind, randomise_):
    torch.manual_seed(0)
    baseline = randomise_(MODELS.build(dict(copy.deepcopy(BACKBONES[name]), replacement=None)))
    result = build(name, kind).load_state_dict(baseline.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


@fitting
def test_init_weights_leaves_the_layers_finite(name, kind):
    model = build(name, kind)
    model.init_weights()
    for layer in computing_layers(model).values():
        assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
        assert layer.scale.eq(layer.operator.scale).all()


@pytest.mark.parametrize(('name', 'kind'), UNFIT, ids=['-'.join(pair) for pair in UNFIT])
def test_unfit_raises_one_line_that_names_what_fits(name, kind):
    with pytest.raises(ValueError, match=f'{kind} can\'t stand for a ') as raised:
        build(name, kind)
    message = str(raised.value)
    assert '\n' not in message
    fitting = 'FullBlock can' if name == 'detectors' else f'what fits: {", ".join([*FITS[name], "FullBlock"])}'
    assert re.search(rf'{re.escape(fitting)}[;)]', message), message


def test_checkpointing_backbone_has_equal_gradients(randomise_):
    for kind in ALL:
        nets = [randomise_(build('r50', kind, with_cp=with_cp)) for with_cp in (False, True)]
        for net in nets:
            step(net)
        for (name, plain), again in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(again.grad, plain.grad, msg=name)
