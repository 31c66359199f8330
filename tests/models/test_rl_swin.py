"""Swin: what is special to it, besides what test_backbones.py says of every class."""
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.models.backbones import SwinTransformer
from mmengine.config import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from rl_mmdet.models import RLSwin
from rl_mmdet.replacement import computing_layers, materialize

TINY = dict(embed_dims=16, depths=(2, 2, 6, 2), num_heads=(1, 2, 2, 4), window_size=4)
STAGE = 'stages.2.blocks'
TABLE = 'attn.w_msa.relative_position_bias_table'


def build(*replaced: int, **more: Any) -> RLSwin:
    """The same weights at every call, the blocks ``replaced`` of the third stage replaced."""
    torch.manual_seed(0)
    replacement = dict(plan=dict(type='Blocks', blocks={STAGE: list(replaced)})) if replaced else None
    return RLSwin(**dict(TINY, **more), replacement=replacement)


def shifts(model: nn.Module) -> list[int]:
    return [block.attn.shift_size for block in model.get_submodule(STAGE)]


# Windows

@pytest.mark.parametrize('index', [1, 2, 3, 4])
def test_materialized_block_keeps_its_own_shift(index):
    assert shifts(materialize(build(index))) == [0, 2, 0, 2, 0, 2]


@pytest.mark.parametrize('index', [2, 3])
def test_replaced_block_computes_with_its_own_shift(index, randomise_, in_mode):
    """Its output is its neighbours' with mixed weights, shifted as it was: not what the other parity gives."""
    layer = in_mode(randomise_(build(index)), False).get_submodule(f'{STAGE}.{index}')
    tokens, size = torch.randn(1, 64, 64), (8, 8)
    outputs = {}
    for shift in (0, 2):
        block = SwinTransformer(**TINY).get_submodule(f'{STAGE}.{shift // 2}')
        block.load_state_dict(layer.synthesise(), strict=False)
        outputs[shift] = in_mode(block, False)(tokens, size)
    own, other = (outputs[shift] for shift in ((0, 2) if index % 2 == 0 else (2, 0)))
    torch.testing.assert_close(layer(tokens, size), own)
    assert not torch.allclose(own, other, rtol=1e-2, atol=1e-2)


def test_position_table_is_fused_from_the_neighbours(randomise_):
    model = randomise_(build(3))
    layer = model.get_submodule(f'{STAGE}.3')
    before, after = (model.get_parameter(f'{STAGE}.{index}.{TABLE}') for index in (2, 4))
    torch.testing.assert_close(layer.synthesise()[TABLE], layer.coeff[0] * before + layer.coeff[1] * after)


def test_position_table_of_a_replaced_block_is_not_saved():
    saved = [key for key in build(3).state_dict() if key.startswith(f'{STAGE}.3.attn')]
    assert saved == [f'{STAGE}.3.attn.w_msa.relative_position_index']


# Which blocks

@pytest.mark.parametrize(('stage', 'index', 'why'), [
    (0, 0, 'no kept block before it in its stage'), (0, 1, 'no kept block after it in its stage'),
    (3, 0, 'no kept block before it in its stage'), (3, 1, 'no kept block after it in its stage')])
def test_stages_of_depth_two_cannot_be_replaced(stage, index, why):
    plan = dict(type='Blocks', blocks={f'stages.{stage}.blocks': [index]})
    with pytest.raises(ValueError, match=rf"stages.{stage}.blocks block {index} can't be replaced: {why}.*"
                                         r'that can be replaced: stages.2.blocks: \[1, 2, 3, 4\]'):
        RLSwin(**TINY, replacement=dict(plan=plan))


def test_stages_of_depth_two_are_explained_in_the_report():
    report = str(build(3).replacement_report)
    assert "stages.0.blocks.1 (SwinBlock): kept, can't be replaced: no kept block after it in its stage" in report


def test_frozen_stage_named_in_the_plan_raises():
    with pytest.raises(ValueError, match=r'stages.2.blocks block 3 can.t be replaced: its stage is frozen'):
        build(3, frozen_stages=3)


def test_frozen_stages_do_not_learn_and_the_others_do(in_mode):
    model = in_mode(build(3, frozen_stages=2), True)
    learning = {name.split('.')[1] for name, p in model.named_parameters()
                if name.startswith('stages') and p.requires_grad}
    assert learning == {'2', '3'}


# The parent's arguments

@pytest.mark.parametrize(('out_indices', 'expected'), [
    ((0, 1, 2, 3), [(1, 16, 16, 16), (1, 32, 8, 8), (1, 64, 4, 4), (1, 128, 2, 2)]),
    ((1, 2), [(1, 32, 8, 8), (1, 64, 4, 4)])])
def test_out_indices_choose_the_maps(out_indices, expected, image, in_mode):
    model = in_mode(build(3, out_indices=out_indices), False)
    assert [tuple(out.shape) for out in model(image[:1])] == expected


@pytest.mark.parametrize(('out_indices', 'index'), [((0, 4), 4), ((-1,), -1)])
def test_out_indices_that_do_not_exist_raise(out_indices, index):
    with pytest.raises(ValueError, match=rf'RLSwin: out_indices .* has {index}, but there are 4 stages; .* 0 to 3'):
        RLSwin(**TINY, out_indices=out_indices)


def test_out_indices_of_fewer_stages_raise():
    with pytest.raises(ValueError, match=r'RLSwin: out_indices \(0, 1, 2, 3\) has 2, but there are 2 stages'):
        RLSwin(embed_dims=16, depths=(2, 4), num_heads=(1, 2), strides=(4, 2))


@pytest.mark.parametrize('replaced', [[], [3]], ids=['unreplaced', 'replaced'])
def test_frozen_stages_that_do_not_exist_raise(replaced):
    with pytest.raises(ValueError, match=r'frozen_stages.*5'):
        build(*replaced, frozen_stages=5)


@pytest.mark.parametrize('init_cfg', [dict(type='Normal', layer='Linear'), [dict(type='Normal', layer='Linear')]])
def test_init_cfg_without_a_checkpoint_raises(init_cfg):
    with pytest.raises(ValueError, match=r'init_cfg.*Pretrained'):
        build(3, init_cfg=init_cfg).init_weights()


def test_with_cp_is_done_for_the_computing_layer_in_its_place():
    [layer] = computing_layers(build(3, with_cp=True)).values()
    assert layer.checkpointed
    assert not layer.template.with_cp


@pytest.mark.parametrize('with_cp', [False, True])
def test_drop_path_is_the_materialized_models_with_the_same_seed(with_cp, image, in_mode, assert_near):
    model = in_mode(build(1, 3, drop_path_rate=0.5, with_cp=with_cp), True)
    outs = []
    for each, seed in ((model, 7), (materialize(model), 7), (model, 8)):
        torch.manual_seed(seed)
        outs.append(each(image)[2])
    assert_near(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


# Weights in Swin's original layout, which mmdet's class reads with convert_weights=True

def to_original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmdet's names and order of merged patches back to those of Swin's own repository, as published."""
    original = {'norm.weight': torch.ones(128), 'head.weight': torch.zeros(5, 128), 'head.bias': torch.zeros(5)}
    for key, value in tensors.items():
        if re.match(r'norm\d', key):
            continue
        key = re.sub(r'^stages', 'layers', key).replace('attn.w_msa.', 'attn.').replace('projection', 'proj')
        key = key.replace('ffn.layers.0.0.', 'mlp.fc1.').replace('ffn.layers.1.', 'mlp.fc2.')
        if 'downsample.reduction' in key:
            value = value.unflatten(1, (-1, 4)).transpose(1, 2)[:, [0, 2, 1, 3]].flatten(1)
        elif 'downsample.norm' in key:
            value = value.unflatten(0, (-1, 4)).T[[0, 2, 1, 3]].flatten()
        original[key] = value
    for index in (1, 3, 5):
        original[f'layers.2.blocks.{index}.attn_mask'] = torch.zeros(16, 16, 16)
    return original


@pytest.fixture
def baseline(randomise_, in_mode) -> SwinTransformer:
    """The class that the file's weights come from; the norms of the outputs are as they are initialised."""
    torch.manual_seed(0)
    model = in_mode(randomise_(SwinTransformer(**TINY)), False)
    for index in range(4):
        nn.init.ones_(getattr(model, f'norm{index}').weight)
        nn.init.zeros_(getattr(model, f'norm{index}').bias)
    return model


@pytest.fixture
def original(baseline, tmp_path) -> ConfigDict:
    """``init_cfg`` that names a file in the original layout."""
    return saved(baseline, tmp_path)


def saved(baseline: nn.Module, folder: Path) -> ConfigDict:
    torch.save(dict(model=to_original(baseline.state_dict())), folder / 'swin_original.pth')
    return ConfigDict(type='Pretrained', checkpoint=str(folder / 'swin_original.pth'))


@pytest.mark.parametrize('cls', [SwinTransformer, RLSwin])
def test_original_layout_gives_the_outputs_it_was_made_of(cls, baseline, original, image, in_mode):
    model = cls(**TINY, convert_weights=True, init_cfg=original)
    model.init_weights()
    outs = in_mode(model, False)(image), baseline(image)
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))


@pytest.mark.parametrize('convert_weights', [True, False])
def test_original_layout_loads_the_kept_blocks_of_a_replaced_model(convert_weights, baseline, original):
    model = build(1, 3, convert_weights=convert_weights, init_cfg=original)
    model.init_weights()
    state = baseline.state_dict()
    for key, value in model.state_dict().items():
        assert key.endswith('.coeff') or torch.equal(value, state[key]), key


def test_original_layout_of_planted_blocks_gives_the_baselines_outputs(baseline, image, in_mode, assert_near, tmp_path):
    blocks = baseline.get_submodule(STAGE)
    with torch.no_grad():
        for name, parameter in blocks[3].named_parameters():
            parameter.copy_(0.75 * blocks[2].get_parameter(name) - 0.5 * blocks[4].get_parameter(name))
    model = RLSwin(**TINY, convert_weights=True, init_cfg=saved(baseline, tmp_path),
                   replacement=dict(plan=dict(type='Blocks', blocks={STAGE: [3]}),
                                    fusion=dict(pretrained='least_squares')))
    model.init_weights()
    torch.testing.assert_close(model.get_parameter(f'{STAGE}.3.coeff').detach(), torch.tensor([0.75, -0.5]))
    assert_near(in_mode(model, False)(image), baseline(image), 1e-4)


@pytest.mark.parametrize('window', [2, 7])
def test_original_layout_of_another_window_size_has_its_tables_interpolated(window, baseline, original):
    model = RLSwin(**dict(TINY, window_size=window), init_cfg=original)
    model.init_weights()
    given = baseline.get_parameter(f'{STAGE}.0.{TABLE}')  # offsets from -3 to 3 in both directions, two heads
    square = F.interpolate(given.T.view(1, 2, 7, 7), (2 * window - 1, 2 * window - 1), mode='bicubic')
    torch.testing.assert_close(model.get_parameter(f'{STAGE}.0.{TABLE}'), square.view(2, -1).T)


def test_init_weights_without_checkpoint_is_the_parents_distribution():
    torch.manual_seed(0)
    model = build(1, 3)
    model.init_weights()
    weight = model.get_parameter(f'{STAGE}.2.ffn.layers.0.0.weight')
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
