"""ViTDet's pyramid: shapes, what each level is made of, bad arguments."""
import pytest
import torch
from mmcv.cnn import build_norm_layer
from mmdet.registry import MODELS

from rl_mmdet.models import LN2d, RLViT, SimpleFPN


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 16, 6, 10, generator=torch.Generator().manual_seed(3))


def test_levels_have_strides_4_8_16_32_64_of_patches_of_16_pixels(features):
    levels = SimpleFPN(16, out_channels=8)([features])
    assert [tuple(level.shape) for level in levels] == [
        (2, 8, 24, 40), (2, 8, 12, 20), (2, 8, 6, 10), (2, 8, 3, 5), (2, 8, 2, 3)]
    assert torch.equal(levels[4], levels[3][..., ::2, ::2])
    assert len(SimpleFPN(16, out_channels=8, num_outs=6)([features])) == 6


def test_levels_of_an_odd_map_are_rounded_up():
    levels = SimpleFPN(16, out_channels=8)([torch.randn(1, 16, 5, 7)])
    assert [tuple(level.shape[2:]) for level in levels] == [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2)]


def test_levels_have_weights_of_their_own_which_all_learn(features):
    fpn = SimpleFPN(16, out_channels=8)
    before = fpn([features])
    sum(level.square().sum() for level in before).backward()
    assert [name for name, p in fpn.named_parameters() if p.grad is None or not p.grad.any()] == []
    torch.nn.init.zeros_(fpn.lateral_convs[2].conv.weight)
    unchanged = [torch.equal(one, other) for one, other in zip(before, fpn([features]), strict=True)]
    assert unchanged == [True, True, False, True, True]


def test_settings_of_norm_and_activation_are_used():
    default = SimpleFPN(16, out_channels=8)
    for module in (*default.lateral_convs, *default.fpn_convs):
        assert (module.conv.bias, module.with_activation, type(module.norm)) == (None, False, LN2d)
    fpn = SimpleFPN(16, out_channels=8, norm_cfg=dict(type='GN', num_groups=2), act_cfg=dict(type='ReLU'))
    assert all(isinstance(module.norm, torch.nn.GroupNorm) and module.with_activation for module in fpn.fpn_convs)


def test_takes_the_map_of_a_plain_vit():
    backbone = RLViT(dict(embed_dim=16, depth=4, num_heads=2), img_size=64, window_size=2)
    neck = MODELS.build(dict(type='SimpleFPN', backbone_channel=backbone.out_channels[0], out_channels=8,
                             in_channels=[4, 8, 16, 16]))
    levels = neck(backbone(torch.randn(1, 3, 64, 96)))
    assert [64 // level.shape[2] for level in levels] == [4, 8, 16, 32, 64]


@pytest.mark.parametrize(('arguments', 'match'), [
    (dict(in_channels=[4, 8, 16, 32]), r"in_channels \[.*\] don't follow from backbone_channel=16; leave them out, or "
                                       r'give \[4, 8, 16, 16\]'),
    (dict(num_outs=3), 'num_outs must be at least 4, got 3')])
def test_bad_argument_raises(arguments, match):
    with pytest.raises(ValueError, match=match):
        SimpleFPN(16, **arguments)


def test_several_maps_raise(features):
    with pytest.raises(ValueError, match=r"takes one map, got 2; set the backbone's out_indices to one"):
        SimpleFPN(16)([features, features])


def test_ln2d_normalises_the_channels_of_every_pixel_and_is_known_to_mmcv(features):
    name, norm = build_norm_layer(dict(type='LN2d', eps=1e-3), 16, postfix=1)
    assert (name, sorted(norm.state_dict())) == ('ln1', ['bias', 'weight'])
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    mean, variance = features.mean(1, keepdim=True), features.var(1, unbiased=False, keepdim=True)
    expected = (features - mean) / (variance + 1e-3).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(features), expected, rtol=1e-4, atol=1e-5)
