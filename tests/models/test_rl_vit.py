"""Plain vision transformers: what is special to them, besides what test_backbones.py says of every class."""
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch.nn import functional as F

from rl_mmdet.models import RLViT
from rl_mmdet.replacement import computing_layers, materialize

SIZES = dict(embed_dim=24, depth=8, num_heads=2)
TINY = dict(arch=SIZES, img_size=64, window_size=2)  # 4x4 patches; the blocks 1, 3, 5 and 7 are global
PLAIN = dict(type='RLBackbone', timm='vit_tiny_patch16_224', embed_dim=24, depth=4, num_heads=2)
GLOBAL, WINDOW = 2 * 4 - 1, 2 * 2 - 1


def build(*replaced: int, **more: Any) -> RLViT:
    """The same weights at every call, the blocks ``replaced`` replaced."""
    torch.manual_seed(0)
    replacement = dict(plan=dict(type='Blocks', blocks={'blocks': list(replaced)})) if replaced else None
    return MODELS.build(dict(TINY, **more, type='RLViT', replacement=replacement))


@pytest.fixture
def vit(randomise_, in_mode):
    def make(*replaced: int, **more: Any) -> RLViT:
        return in_mode(randomise_(build(*replaced, **more)), False)
    return make


def global_blocks(model: RLViT) -> list[int]:
    return [index for index, block in enumerate(model.blocks) if block.window_size == 0]


# Which blocks are global, and where a replaced block's position tables come from

@pytest.mark.parametrize(('depth', 'given', 'expected'), [
    (8, None, [1, 3, 5, 7]), (12, None, [2, 5, 8, 11]), (6, None, [0, 2, 3, 5]), (8, [0, 6], [0, 6])])
def test_global_blocks_are_as_given_or_the_last_of_each_quarter(depth, given, expected):
    assert global_blocks(build(arch=dict(SIZES, depth=depth), global_attn_indexes=given)) == expected


@pytest.mark.parametrize(('replaced', 'index', 'tables', 'others', 'rows'), [
    ([3], 3, (1, 5), (2, 4), GLOBAL),         # a global block between windowed ones
    ([2], 2, (0, 4), (1, 3), WINDOW),         # a windowed block between global ones
    ([1, 3, 5], 3, (None, 7), (2, 4), GLOBAL),  # all other global blocks but one are replaced as well
    ([2, 3], 2, (0, 4), (1, 4), WINDOW),      # two replaced blocks side by side
])
def test_position_tables_come_from_the_nearest_blocks_of_the_same_kind(vit, replaced, index, tables, others, rows):
    model = vit(*replaced)
    plain = materialize(model)
    assert global_blocks(plain) == [1, 3, 5, 7]
    for name, value in plain.blocks[index].named_parameters():
        sides = tables if 'rel_pos' in name else others
        expected = sum(factor * model.blocks[side].get_parameter(name)
                       for factor, side in zip(model.blocks[index].coeff, sides, strict=True) if side is not None)
        torch.testing.assert_close(value, expected, msg=name)
        assert 'rel_pos' not in name or value.shape == (rows, 12)


def test_global_block_alone_of_its_kind_can_be_replaced_only_without_positions():
    with pytest.raises(ValueError, match=r"blocks block 3 can't be replaced: attn.rel_pos_h \(7, 12\) has no tensor"):
        build(3, global_attn_indexes=[3])
    model = build(3, global_attn_indexes=[3], use_rel_pos=False)
    assert list(computing_layers(model)) == ['blocks.3']
    assert not any('rel_pos' in name for name, _ in model.named_parameters())


def test_frozen_blocks_stay_whatever_the_plan():
    replacement = dict(plan=dict(type='EveryKth', k=2))
    model = MODELS.build(dict(TINY, type='RLViT', frozen_stages=4, replacement=replacement))
    assert list(computing_layers(model)) == ['blocks.5']
    with pytest.raises(ValueError, match="block 3 can't be replaced: it is frozen"):
        build(3, frozen_stages=4)


# Images

@pytest.mark.parametrize(('size', 'grid'), [((64, 64), (4, 4)), ((48, 80), (3, 5)), ((70, 33), (5, 3))])
def test_images_of_any_size_give_a_map_with_the_stride_of_a_patch(vit, size, grid):
    [features] = vit(2, 3)(torch.randn(2, 3, *size))
    assert features.shape == (2, 24, *grid)


@pytest.mark.parametrize('kind', [dict(TINY, type='RLViT'), PLAIN])
def test_images_between_two_multiples_of_a_patch_are_padded_with_zeros_below_and_right(kind, randomise_, in_mode):
    model = in_mode(randomise_(MODELS.build(dict(kind))), False)
    image = torch.randn(1, 3, 70, 33)
    assert torch.equal(model(image)[0], model(F.pad(image, (0, 15, 0, 10)))[0])


def test_images_smaller_than_a_patch_raise(vit):
    with pytest.raises(ValueError, match=r'images of 64x15 pixels are smaller than the stride 16 of its last feature'):
        vit()(torch.zeros(1, 3, 64, 15))


def test_windowed_attention_stays_in_its_window(vit):
    model, image = vit(2, 4, global_attn_indexes=[]), torch.randn(1, 3, 64, 64)
    changed = image.clone()
    changed[..., :32, :32] += 1  # the window of 2x2 patches in the corner
    difference = (model(changed)[0] - model(image)[0]).abs().sum((0, 1)) > 0
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, :2] = True
    assert torch.equal(difference, expected)


def test_positions_are_interpolated_to_the_image(vit):
    """A map of equal positions stays so in every size; then images of one color have one feature everywhere."""
    model = vit(global_attn_indexes=[], use_rel_pos=False)
    with torch.no_grad():
        model.pos_embed.copy_(torch.randn(24))
    [features] = model(torch.ones(1, 3, 96, 128))
    torch.testing.assert_close(features, features[..., :1, :1].expand_as(features), rtol=1e-4, atol=1e-4)


# Arguments

def test_arch_by_name_has_its_sizes():
    tiny, default = RLViT('tiny', img_size=64), RLViT()
    assert (len(tiny.blocks), tiny.out_channels, tiny.blocks[0].attn.num_heads) == (12, [192], 3)
    assert (len(default.blocks), default.out_channels, default.pos_embed.shape) == (12, [768], (1, 64, 64, 768))


@pytest.mark.parametrize(('arguments', 'match'), [
    (dict(arch='Base'), r"'Base'; allowed: tiny, small, base, large, huge, or a dict with embed_dim"),
    (dict(arch=dict(SIZES, heads=2)), 'arch must have embed_dim, depth and num_heads, got'),
    (dict(timm='vit_tiny_patch16_224'), r"use dict\(type='RLBackbone', timm='vit_tiny_patch16_224'\)"),
    (dict(TINY, img_size=70), 'img_size=70 is no multiple of patch_size=16'),
    (dict(TINY, global_attn_indexes=[1, 8]), r'global_attn_indexes \[1, 8\] has 8, but the blocks are 0 to 7'),
    (dict(TINY, width=3), "unexpected keyword argument 'width'"),
])
def test_bad_argument_raises(arguments, match):
    with pytest.raises(ValueError, match=match):
        RLViT(**arguments)


def test_norm_is_applied_to_the_map(randomise_, in_mode):
    plain, normed = (in_mode(randomise_(MODELS.build(dict(PLAIN, norm=norm))), False) for norm in (False, True))
    normed.load_state_dict(plain.state_dict(), strict=False)
    norm, image = normed.body.norm, torch.randn(1, 3, 64, 64)
    channels_last = plain(image)[0].permute(0, 2, 3, 1)
    by_hand = F.layer_norm(channels_last, (24,), norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2)
    torch.testing.assert_close(normed(image)[0], by_hand, rtol=1e-4, atol=1e-4)
