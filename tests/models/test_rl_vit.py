"""Plain vision transformers: what is special to them, besides what test_backbones.py says of every class."""
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch.nn import functional as F

from rl_mmdet.models import RLViT
from rl_mmdet.models.backbones.rl_vit import RLPlainViT, RLViTDet
from rl_mmdet.models.backbones.timm_backbone import TimmBackbone
from rl_mmdet.replacement import computing_layers

SIZES = dict(embed_dim=24, depth=8, num_heads=2)
TINY = dict(arch=SIZES, img_size=64, window_size=2)  # 4x4 patches; the blocks 1, 3, 5 and 7 are global
PLAIN = dict(timm='vit_tiny_patch16_224', embed_dim=24, depth=4, num_heads=2)
GLOBAL, WINDOW = 2 * 4 - 1, 2 * 2 - 1


def build(*replaced: int, **more: Any) -> TimmBackbone:
    """The same weights at every call, the blocks ``replaced`` replaced."""
    torch.manual_seed(0)
    replacement = dict(plan=dict(type='Blocks', blocks={'blocks': list(replaced)})) if replaced else None
    return RLViT(**dict(TINY, **more), replacement=replacement)


@pytest.fixture
def vit(randomise_, in_mode):
    def make(*replaced: int, **more: Any) -> TimmBackbone:
        return in_mode(randomise_(build(*replaced, **more)), False)
    return make


# Which blocks are global, and where a replaced block's position tables come from

@pytest.mark.parametrize(('depth', 'expected'), [(8, [1, 3, 5, 7]), (12, [2, 5, 8, 11]), (6, [0, 2, 3, 5])])
def test_global_blocks_are_by_default_the_last_of_each_quarter(depth, expected):
    model = build(arch=dict(SIZES, depth=depth))
    assert [index for index, block in enumerate(model.blocks) if block.window_size == 0] == expected


def test_global_blocks_as_given():
    model = build(global_attn_indexes=[0, 6])
    assert [index for index, block in enumerate(model.blocks) if block.window_size == 0] == [0, 6]


@pytest.mark.parametrize('index', [-1, 8])
def test_global_blocks_that_do_not_exist_raise(index):
    with pytest.raises(ValueError, match=rf'global_attn_indexes \[1, {index}\] has {index}, but the blocks are 0 to 7'):
        build(global_attn_indexes=[1, index])


@pytest.mark.parametrize(('replaced', 'index', 'tables', 'others', 'rows'), [
    ([3], 3, (1, 5), (2, 4), GLOBAL),         # a global block between windowed ones
    ([2], 2, (0, 4), (1, 3), WINDOW),         # a windowed block between global ones
    ([1, 3, 5], 3, (None, 7), (2, 4), GLOBAL),  # all other global blocks but one are replaced as well
    ([2, 3], 2, (0, 4), (1, 4), WINDOW),      # two replaced blocks side by side
])
def test_position_tables_come_from_the_nearest_blocks_of_the_same_kind(vit, replaced, index, tables, others, rows):
    model = vit(*replaced)
    layer = model.blocks[index]
    for name, value in layer.synthesise().items():
        sides = tables if 'rel_pos' in name else others
        expected = sum(factor * model.blocks[side].get_parameter(name)
                       for factor, side in zip(layer.coeff, sides, strict=True) if side is not None)
        torch.testing.assert_close(value, expected, msg=name)
        assert 'rel_pos' not in name or value.shape == (rows, 12)


def test_replaced_blocks_keep_their_own_kind_of_attention():
    layers = computing_layers(build(2, 3))
    assert [layer.template.window_size for layer in layers.values()] == [2, 0]


def test_global_block_alone_of_its_kind_cannot_be_replaced():
    with pytest.raises(ValueError, match=r"blocks block 3 can't be replaced: attn.rel_pos_h \(7, 12\) has no tensor"):
        build(3, global_attn_indexes=[3])


def test_global_block_alone_of_its_kind_can_be_replaced_without_positions():
    assert list(computing_layers(build(3, global_attn_indexes=[3], use_rel_pos=False))) == ['blocks.3']


# Images

@pytest.mark.parametrize(('size', 'grid'), [((64, 64), (4, 4)), ((48, 80), (3, 5)), ((160, 32), (10, 2)),
                                            ((70, 33), (5, 3))])
def test_images_of_any_size_give_a_map_with_the_stride_of_a_patch(vit, size, grid):
    [features] = vit(2, 3)(torch.randn(2, 3, *size))
    assert features.shape == (2, 24, *grid)


@pytest.mark.parametrize('kind', [TINY, PLAIN])
def test_images_between_two_multiples_of_a_patch_are_padded_with_zeros_below_and_right(kind, randomise_, in_mode):
    model = in_mode(randomise_(RLViT(**kind)), False)
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


@pytest.mark.parametrize('use_rel_pos', [True, False])
def test_relative_positions_are_learned_or_not_there(use_rel_pos):
    names = [name for name, _ in build(2, use_rel_pos=use_rel_pos).named_parameters() if 'rel_pos' in name]
    assert len(names) == (14 if use_rel_pos else 0)


def test_positions_are_interpolated_to_the_image(vit):
    """A map of equal positions stays so in every size; then images of one color have one feature everywhere."""
    model = vit(global_attn_indexes=[], use_rel_pos=False)
    with torch.no_grad():
        model.pos_embed.copy_(torch.randn(24))
    [features] = model(torch.ones(1, 3, 96, 128))
    torch.testing.assert_close(features, features[..., :1, :1].expand_as(features), rtol=1e-4, atol=1e-4)


# Arguments

def test_arch_by_name_has_its_sizes():
    model = RLViT('tiny', img_size=64, window_size=2)
    assert (len(model.blocks), model.out_channels, model.blocks[0].attn.num_heads) == (12, [192], 3)


def test_arch_by_default_is_base():
    with torch.device('meta'):
        model = RLViT()
    assert (len(model.blocks), model.out_channels, model.pos_embed.shape) == (12, [768], (1, 64, 64, 768))


@pytest.mark.parametrize('arch', ['giant', 'Base', 12])
def test_arch_unknown_raises(arch):
    with pytest.raises(ValueError, match=rf'{arch!r}.* allowed: tiny, small, base, large, huge, or a dict with emb'):
        RLViT(arch)


@pytest.mark.parametrize('arch', [dict(embed_dim=24, depth=2), dict(SIZES, heads=2)])
def test_arch_of_other_keys_raises(arch):
    with pytest.raises(ValueError, match='arch must have embed_dim, depth and num_heads, got'):
        RLViT(arch)


def test_arch_and_timm_both_raise():
    with pytest.raises(ValueError, match=r"RLViT: arch='tiny' and timm='vit_tiny_patch16_224' both say which model"):
        RLViT('tiny', timm='vit_tiny_patch16_224')


def test_timm_model_with_a_pyramid_raises_and_names_the_right_type():
    with pytest.raises(ValueError, match=r"convnext_atto is no plain ViT.* use dict\(type='RLBackbone', timm='conv"):
        RLViT(timm='convnext_atto', dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))


def test_img_size_that_is_no_multiple_of_a_patch_raises():
    with pytest.raises(ValueError, match='img_size=70 is no multiple of patch_size=16'):
        build(img_size=70)


@pytest.mark.parametrize(('cfg', 'cls'), [(TINY, RLViTDet), (PLAIN, RLPlainViT)])
def test_registry_builds_both_kinds(cfg, cls):
    assert type(MODELS.build(dict(cfg, type='RLViT'))) is cls


def test_norm_is_applied_to_the_map(randomise_, in_mode):
    plain, normed = (in_mode(randomise_(RLViT(**PLAIN, norm=norm)), False) for norm in (False, True))
    normed.load_state_dict(plain.state_dict(), strict=False)
    norm, image = normed.body.norm, torch.randn(1, 3, 64, 64)
    channels_last = plain(image)[0].permute(0, 2, 3, 1)
    by_hand = F.layer_norm(channels_last, (24,), norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2)
    torch.testing.assert_close(normed(image)[0], by_hand, rtol=1e-4, atol=1e-4)
