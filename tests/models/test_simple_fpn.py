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
    sizes = [tuple(level.shape) for level in SimpleFPN(16, out_channels=8)([features])]
    assert sizes == [(2, 8, 24, 40), (2, 8, 12, 20), (2, 8, 6, 10), (2, 8, 3, 5), (2, 8, 2, 3)]


@pytest.mark.parametrize('num_outs', [4, 5, 6])
def test_levels_are_as_many_as_asked_for(features, num_outs):
    assert len(SimpleFPN(16, out_channels=8, num_outs=num_outs)([features])) == num_outs


def test_levels_of_an_odd_map_are_rounded_up():
    levels = SimpleFPN(16, out_channels=8)([torch.randn(1, 16, 5, 7)])
    assert [tuple(level.shape[2:]) for level in levels] == [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2)]


def test_fifth_level_is_every_second_pixel_of_the_fourth(features):
    levels = SimpleFPN(16, out_channels=8)([features])
    assert torch.equal(levels[4], levels[3][..., ::2, ::2])


def test_levels_have_weights_of_their_own(features):
    fpn = SimpleFPN(16, out_channels=8)
    before = fpn([features])
    torch.nn.init.zeros_(fpn.lateral_convs[2].conv.weight)
    unchanged = [torch.equal(one, other) for one, other in zip(before, fpn([features]), strict=True)]
    assert unchanged == [True, True, False, True, True]


def test_convolutions_have_a_norm_instead_of_a_bias_and_no_activation():
    fpn = SimpleFPN(16, out_channels=8)
    for module in (*fpn.lateral_convs, *fpn.fpn_convs):
        assert (module.conv.bias, module.with_activation, type(module.norm)) == (None, False, LN2d)


def test_every_parameter_learns(features):
    fpn = SimpleFPN(16, out_channels=8)
    sum(level.square().sum() for level in fpn([features])).backward()
    assert [name for name, p in fpn.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_settings_of_norm_and_activation_are_used():
    fpn = SimpleFPN(16, out_channels=8, norm_cfg=dict(type='GN', num_groups=2), act_cfg=dict(type='ReLU'))
    assert all(isinstance(module.norm, torch.nn.GroupNorm) and module.with_activation for module in fpn.fpn_convs)


def test_takes_the_map_of_a_plain_vit():
    backbone = RLViT(dict(embed_dim=16, depth=4, num_heads=2), img_size=64, window_size=2)
    neck = MODELS.build(dict(type='SimpleFPN', backbone_channel=backbone.out_channels[0], out_channels=8))
    levels = neck(backbone(torch.randn(1, 3, 64, 96)))
    assert [64 // level.shape[2] for level in levels] == [4, 8, 16, 32, 64]


def test_in_channels_that_follow_are_accepted():
    assert SimpleFPN(16, in_channels=[4, 8, 16, 16]).num_outs == 5


@pytest.mark.parametrize('in_channels', [[16], [4, 8, 16, 32]])
def test_in_channels_that_do_not_follow_raise(in_channels):
    with pytest.raises(ValueError, match=r"in_channels \[.*\] don't follow from backbone_channel=16; leave them "
                                         r'out, or give \[4, 8, 16, 16\]'):
        SimpleFPN(16, in_channels=in_channels)


def test_num_outs_below_four_raises():
    with pytest.raises(ValueError, match='num_outs must be at least 4, got 3'):
        SimpleFPN(16, num_outs=3)


def test_several_maps_raise(features):
    with pytest.raises(ValueError, match=r"takes one map, got 2; set the backbone's out_indices to one"):
        SimpleFPN(16)([features, features])


def test_ln2d_normalises_the_channels_of_every_pixel(features):
    norm = LN2d(16)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    mean, variance = features.mean(1, keepdim=True), features.var(1, unbiased=False, keepdim=True)
    expected = (features - mean) / (variance + 1e-6).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(features), expected, rtol=1e-4, atol=1e-5)


def test_ln2d_of_one_pixel_does_not_depend_on_the_others(features):
    norm, alone = LN2d(16), torch.zeros_like(features)
    alone[..., 2, 3] = features[..., 2, 3]
    torch.testing.assert_close(norm(alone)[..., 2, 3], norm(features)[..., 2, 3])


def test_ln2d_is_known_to_mmcv_as_a_norm():
    name, norm = build_norm_layer(dict(type='LN2d', eps=1e-3), 4, postfix=1)
    assert (name, type(norm), norm.eps) == ('ln1', LN2d, 1e-3)
