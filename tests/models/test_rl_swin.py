"""Swin: what is special to it, besides what test_backbones.py says of every class."""
from typing import Any

import pytest
import torch
from mmdet.models.backbones import SwinTransformer

from rl_mmdet.models import RLSwin
from rl_mmdet.replacement import materialize

TINY = dict(embed_dims=16, depths=(2, 2, 6, 2), num_heads=(1, 2, 2, 4), window_size=4)
STAGE = 'stages.2.blocks'
TABLE = 'attn.w_msa.relative_position_bias_table'


def build(*replaced: int, **more: Any) -> RLSwin:
    """The same weights at every call, the blocks ``replaced`` of the third stage replaced."""
    torch.manual_seed(0)
    replacement = dict(plan=dict(type='Blocks', blocks={STAGE: list(replaced)}), gradient=dict(every=1))
    return RLSwin(**dict(TINY, **more), replacement=replacement if replaced else None)


# Windows

@pytest.mark.parametrize('index', [2, 3])
def test_replaced_block_computes_with_its_own_shift(index, randomise_, in_mode):
    """Its output is its neighbours' with mixed weights, shifted as it was: not what the other parity gives."""
    model = in_mode(randomise_(build(index)), False)
    plain = materialize(model)
    assert [block.attn.shift_size for block in plain.get_submodule(STAGE)] == [0, 2, 0, 2, 0, 2]
    made, layer = plain.get_submodule(f'{STAGE}.{index}'), model.get_submodule(f'{STAGE}.{index}')
    other = in_mode(SwinTransformer(**TINY), False).get_submodule(f'{STAGE}.{index - 1}')
    other.load_state_dict(made.state_dict())
    tokens, size = torch.randn(1, 64, 64), (8, 8)
    torch.testing.assert_close(layer(tokens, size), in_mode(made, False)(tokens, size))
    assert not torch.allclose(layer(tokens, size), other(tokens, size), rtol=1e-2, atol=1e-2)


def test_position_table_is_fused_from_the_neighbours_and_not_saved(randomise_):
    model = randomise_(build(3))
    before, after = (model.get_parameter(f'{STAGE}.{index}.{TABLE}') for index in (2, 4))
    coeff = model.get_parameter(f'{STAGE}.3.coeff')
    made = materialize(model).get_parameter(f'{STAGE}.3.{TABLE}')
    torch.testing.assert_close(made, coeff[0] * before + coeff[1] * after)
    saved = [key for key in model.state_dict() if key.startswith(f'{STAGE}.3.attn')]
    assert saved == [f'{STAGE}.3.attn.w_msa.relative_position_index']


# Which blocks

@pytest.mark.parametrize(('stage', 'index', 'why'), [
    (0, 0, 'no kept block before it in its stage'), (3, 1, 'no kept block after it in its stage')])
def test_stages_of_depth_two_cannot_be_replaced(stage, index, why):
    plan = dict(type='Blocks', blocks={f'stages.{stage}.blocks': [index]})
    with pytest.raises(ValueError, match=rf"stages.{stage}.blocks block {index} can't be replaced: {why}.*"
                                         r'that can be replaced: stages.2.blocks: \[1, 2, 3, 4\]'):
        RLSwin(**TINY, replacement=dict(plan=plan))


def test_stages_of_depth_two_are_explained_in_the_report():
    report = str(build(3).replacement_report)
    assert "stages.0.blocks.1 (SwinBlock): kept, can't be replaced: no kept block after it in its stage" in report


# The parent's arguments

@pytest.mark.parametrize(('out_indices', 'expected'), [
    ((0, 1, 2, 3), [(1, 16, 16, 16), (1, 32, 8, 8), (1, 64, 4, 4), (1, 128, 2, 2)]),
    ((1, 2), [(1, 32, 8, 8), (1, 64, 4, 4)])])
def test_out_indices_choose_the_maps(out_indices, expected, image, in_mode):
    model = in_mode(build(3, out_indices=out_indices), False)
    assert [tuple(out.shape) for out in model(image[:1])] == expected


@pytest.mark.parametrize(('arguments', 'match'), [
    (dict(out_indices=(0, 4)), r'RLSwin: out_indices .* has 4, but there are 4 stages; .* 0 to 3'),
    (dict(out_indices=(-1,)), r'RLSwin: out_indices .* has -1, but there are 4 stages; .* 0 to 3'),
    (dict(depths=(2, 4)), r'RLSwin: out_indices \(0, 1, 2, 3\) has 2, but there are 2 stages'),
    (dict(frozen_stages=5), 'frozen_stages=5, but there are 4 stages; allowed: -1 to 4'),
    (dict(init_cfg=dict(type='Normal', layer='Linear')), 'init_cfg.*Pretrained'),
    (dict(init_cfg=[dict(type='Normal', layer='Linear')]), 'init_cfg.*Pretrained')])
def test_bad_argument_raises(arguments, match):
    with pytest.raises(ValueError, match=match):
        RLSwin(**dict(TINY, **arguments))


def test_frozen_stage_named_in_the_plan_raises():
    with pytest.raises(ValueError, match=r'stages.2.blocks block 3 can.t be replaced: its stage is frozen'):
        build(3, frozen_stages=3)


@pytest.mark.parametrize('with_cp', [False, True])
def test_drop_path_is_the_materialized_models_with_the_same_seed(with_cp, image, in_mode, assert_near):
    model = in_mode(build(1, 3, drop_path_rate=0.5, with_cp=with_cp), True)
    outs = []
    for each, seed in ((model, 7), (materialize(model), 7), (model, 8)):
        torch.manual_seed(seed)
        outs.append(each(image)[2])
    assert_near(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


def test_init_weights_without_checkpoint_is_the_parents_distribution():
    torch.manual_seed(0)
    model = build(1, 3)
    model.init_weights()
    weight = model.get_parameter(f'{STAGE}.2.ffn.layers.0.0.weight')
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
