"""SlimBlock in whole backbones: training steps wherever it fits, and one line that names what fits elsewhere."""
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rl_mmdet.replacement import computing_layers, materialize
from rl_mmdet.replacement.operators.slim_block import SlimConvolutions

FITS = ('RLResNet', 'RLResNet_34', 'RLResNeXt', 'timm_resnet', 'RLSwin', 'timm_swin', 'RLViT', 'timm_vit')
"""What SlimBlock fits of the cases in conftest.py."""
SAMPLE = ('RLResNet', 'RLResNet_34', 'RLResNeXt', 'RLSwin', 'RLViT')


def fitting(*without: str) -> pytest.MarkDecorator:
    """Parametrise by a case's name; those not in the sample are slow."""
    return pytest.mark.parametrize('name', [
        pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in FITS if name not in without])


@pytest.fixture
def build(cases) -> Callable[..., nn.Module]:
    """The same weights at every call, every second block replaced by a SlimBlock."""
    def make(name: str, mode: str = 'detached', **more: Any) -> nn.Module:
        return cases[name].build(mode, operator=dict(type='SlimBlock', width=0.5), **more)
    return make


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


@fitting()
@pytest.mark.parametrize('mode', ['detached', 'coupled'])
def test_step_gives_finite_gradients(name, mode, build, randomise_):
    assert_learns_in_a_step(randomise_(build(name, mode)))


@pytest.mark.parametrize('name', ['RLResNet', 'RLViT'])
def test_step_with_transforms_gives_finite_gradients(name, build, randomise_):
    assert_learns_in_a_step(randomise_(build(name, fusion=dict(type='TransformFusion'))))


@fitting('timm_convnext', 'RLSwin', 'timm_swin', 'RLViT', 'timm_vit')
@pytest.mark.parametrize('norm_eval', [True, False])
def test_step_with_norms_that_learn_statistics_or_do_not(name, norm_eval, build, randomise_):
    model = randomise_(build(name, norm_eval=norm_eval))
    before = {key: buffer.clone() for key, buffer in model.named_buffers() if key.endswith('running_mean')}
    assert_learns_in_a_step(model)
    moved = {key for key, buffer in model.named_buffers() if key in before and not torch.equal(buffer, before[key])}
    assert moved == (set() if norm_eval else set(before))


@fitting('timm_convnext', 'timm_swin')
def test_step_with_frozen_stages_leaves_these_alone(name, build, randomise_):
    model = randomise_(build(name, frozen_stages=2))
    assert_learns_in_a_step(model)
    still = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert still
    assert all(p.grad is None for n, p in model.named_parameters() if n in still)
    assert not any(layer in n for n in still for layer in computing_layers(model))


@fitting()
def test_outputs_have_the_baselines_shapes_and_equal_the_materialized(name, cases, build, randomise_, in_mode,
                                                                      assert_near):
    model = in_mode(randomise_(build(name)), False)
    image = torch.randn(1, 3, 64, 96)
    assert [out.shape for out in model(image)] == [out.shape for out in cases[name].build_baseline()(image)]
    assert_near(model(image), in_mode(materialize(model), False)(image))


@fitting()
def test_weights_are_initialised_and_the_baselines_are_used_without_rest(name, cases, build, randomise_):
    model = build(name)
    model.init_weights()
    for layer in computing_layers(model).values():
        assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
        assert layer.scale.eq(layer.operator.scale).all()
    result = model.load_state_dict(randomise_(cases[name].build_baseline()).state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


@pytest.mark.parametrize('name', ['RLResNet', 'RLResNet_34'])
def test_convolutions_of_their_own_are_initialised_as_the_identity(name, build):
    model = build(name, fusion=dict(type='OwnWeights'))
    model.init_weights()
    blocks = [module for module in model.modules() if isinstance(module, SlimConvolutions)]
    assert blocks
    for block in blocks:
        x = torch.randn(1, block.convs[0].in_channels, 7, 7)
        assert torch.equal(block(x), x)


@pytest.mark.parametrize(('name', 'fits'), [
    ('Res2Net', 'what fits: Skip, FullBlock'), ('timm_convnext', 'what fits: Skip, FullBlock'),
    ('DetectoRS_ResNet', 'FullBlock can')])
def test_unfit_raises_one_line_that_names_what_fits(name, fits, build):
    with pytest.raises(ValueError, match='SlimBlock can\'t stand for a ') as raised:
        build(name)
    message = str(raised.value)
    assert '\n' not in message
    assert re.search(rf'{re.escape(fits)}[;)]', message), message


def test_checkpointing_backbone_has_equal_gradients(build, randomise_):
    plain, again = (randomise_(build('RLResNet', with_cp=with_cp)) for with_cp in (False, True))
    for net in (plain, again):
        assert_learns_in_a_step(net)
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)
