"""Light operators in whole backbones: training steps with each that fits, and one line that names what fits else."""
import copy
import re
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

import rl_mmdet.models  # noqa: F401  registers the RL backbones
from rl_mmdet.replacement import computing_layers, materialize

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
SAMPLE = [('r50', 'DepthwiseBlock'), ('r34', 'PooledBlock'), ('resnext', 'SlimBlock'), ('res2net', 'DepthwiseBlock'),
          ('timm_convnext', 'DepthwiseBlock'), ('swin', 'SlimBlock'), ('vit', 'SlimBlock')]


def pairs(kinds: Any) -> pytest.MarkDecorator:
    """Parametrise by a backbone's name and the operators that ``kinds`` gives for it; those of no sample are slow."""
    return pytest.mark.parametrize(('name', 'kind'), [
        pytest.param(name, kind, id=f'{name}-{kind}', marks=() if (name, kind) in SAMPLE else pytest.mark.slow)
        for name in BACKBONES for kind in kinds(name)])


fitting = pairs(FITS.get)


def build(name: str, kind: str | None, mode: str = 'detached', fusion: str = 'ScalarFusion', **more: Any) -> nn.Module:
    """The same weights at every call, every second block replaced by a light operator, or none."""
    torch.manual_seed(0)
    operator = dict(type=kind, width=0.5) if kind == 'SlimBlock' else dict(type=kind)
    replacement = kind and dict(plan=dict(type='EveryKth', k=2), fusion=dict(type=fusion), operator=operator,
                                gradient=dict(mode=mode))
    return MODELS.build(dict(copy.deepcopy(BACKBONES[name]), **more, replacement=replacement))


def assert_learns_in_a_step(model: nn.Module) -> None:
    """Every number of a computing layer has a gradient, a finite one, and those of a kind aren't all zero.

    One by one they may be: in so thin a block all ReLUs can happen to be closed.
    """
    model.train()
    outs = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)))
    sum(out.square().mean() for out in outs).backward()
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
    assert_learns_in_a_step(randomise_(build(name, kind, mode)))


@pytest.mark.parametrize(('name', 'kind'), [('r50', 'DepthwiseBlock'), ('r50', 'SlimBlock'), ('vit', 'SlimBlock')])
@pytest.mark.parametrize('fusion', ['ChannelFusion', 'TransformFusion'])
def test_step_with_other_fusions_gives_finite_gradients(name, kind, fusion, randomise_):
    assert_learns_in_a_step(randomise_(build(name, kind, fusion=fusion)))


@pairs(lambda name: FITS[name] if name in ('r50', 'r34', 'resnext', 'res2net', 'timm_resnet') else ())
@pytest.mark.parametrize('norm_eval', [True, False])
def test_step_with_norms_that_learn_statistics_or_do_not(name, kind, norm_eval, randomise_):
    model = randomise_(build(name, kind, norm_eval=norm_eval))
    before = {key: buffer.clone() for key, buffer in model.named_buffers() if key.endswith('running_mean')}
    assert_learns_in_a_step(model)
    moved = {key for key, buffer in model.named_buffers() if key in before and not torch.equal(buffer, before[key])}
    assert moved == (set() if norm_eval else set(before))


@pairs(lambda name: FITS[name] if name not in ('timm_convnext', 'timm_swin') else ())
def test_step_with_frozen_stages_leaves_these_alone(name, kind, randomise_):
    model = randomise_(build(name, kind, frozen_stages=2))
    assert_learns_in_a_step(model)
    still = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert still
    assert all(p.grad is None for n, p in model.named_parameters() if n in still)
    assert not any(layer in n for n in still for layer in computing_layers(model))


@fitting
def test_outputs_have_the_baselines_shapes_and_equal_the_materialized(name, kind, randomise_, in_mode, assert_near):
    model = in_mode(randomise_(build(name, kind)), False)
    image = torch.randn(1, 3, 64, 96)
    assert [out.shape for out in model(image)] == [out.shape for out in build(name, None)(image)]
    assert_near(model(image), in_mode(materialize(model), False)(image))


@fitting
def test_weights_are_initialised_and_the_baselines_are_used_without_rest(name, kind, randomise_):
    model = build(name, kind)
    model.init_weights()
    for layer in computing_layers(model).values():
        assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
        assert layer.scale.eq(layer.operator.scale).all()
    result = model.load_state_dict(randomise_(build(name, None)).state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


@pytest.mark.parametrize(('name', 'kind'), [('res2net', 'SlimBlock'), ('timm_convnext', 'SlimBlock'), (
    'swin', 'DepthwiseBlock'), ('vit', 'PooledBlock'), ('detectors', 'SlimBlock')])
def test_unfit_raises_one_line_that_names_what_fits(name, kind):
    with pytest.raises(ValueError, match=f'{kind} can\'t stand for a ') as raised:
        build(name, kind)
    message = str(raised.value)
    assert '\n' not in message
    fits = 'FullBlock can' if name == 'detectors' else f'what fits: {", ".join([*FITS[name], "FullBlock"])}'
    assert re.search(rf'{re.escape(fits)}[;)]', message), message


@pytest.mark.parametrize('kind', ALL)
def test_checkpointing_backbone_has_equal_gradients(kind, randomise_):
    plain, again = (randomise_(build('r50', kind, with_cp=with_cp)) for with_cp in (False, True))
    for net in (plain, again):
        assert_learns_in_a_step(net)
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)
