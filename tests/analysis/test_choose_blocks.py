"""Which blocks of a trained backbone their neighbours explain best, on a config's own data."""
import json
import re

import pytest
import torch

from rl_mmdet.analysis import choose_blocks, error_table
from rl_mmdet.analysis.choose_blocks import calibration_batches
from rl_mmdet.engine import UserError, build_model, load_config
from rl_mmdet.replacement import replace_blocks_
from rl_mmdet.replacement.plans import BestFit, Blocks

BASELINE = 'atss_r34_fpn_digits.py'


@pytest.fixture
def saved(tiny_config, randomise_, tmp_path):
    """The checkpoint of a tiny baseline detector."""
    detector = randomise_(build_model(load_config(tiny_config(BASELINE))))
    torch.save(dict(state_dict=detector.state_dict()), tmp_path / 'baseline.pth')
    return str(tmp_path / 'baseline.pth')


def test_choice_is_that_of_the_plan_on_the_same_batches(tiny_config, saved):
    cfg = load_config(tiny_config(BASELINE))
    report, errors = choose_blocks(cfg, saved, 0.3, batches=2)
    backbone = build_model(cfg).backbone
    weights = torch.load(saved, weights_only=True)['state_dict']
    backbone.load_state_dict({key[9:]: value for key, value in weights.items() if key.startswith('backbone.')})
    plan = BestFit(0.3, calibration_batches(cfg, 2))
    assert replace_blocks_(backbone, dict(plan=plan)).replaced == report.replaced
    assert plan.errors == errors


def test_choice_of_a_replaced_config_is_that_of_its_baseline_with_its_parts(tiny_config, saved):
    replaced = load_config(tiny_config())
    report, errors = choose_blocks(replaced, saved, 0.3, batches=1)
    assert errors == choose_blocks(load_config(tiny_config(BASELINE)), saved, 0.3, batches=1)[1]
    replaced.model.backbone.replacement.fusion = dict(type='ChannelFusion')
    assert choose_blocks(replaced, saved, 0.3, batches=1)[0].settings['fusion'].startswith('ChannelFusion')
    assert sum(row.replaced for row in report.rows) == round(0.3 * len(errors))


@pytest.mark.parametrize('fusion', ['ChannelFusion', json.dumps(dict(type='ChannelFusion', adapt=True))])
def test_fusion_and_operator_can_be_named(tiny_config, saved, fusion):
    report, errors = choose_blocks(load_config(tiny_config(BASELINE)), saved, 0.3, batches=1, fusion=fusion,
                                   operator='SlimBlock')
    assert report.settings['fusion'].startswith('ChannelFusion')
    assert report.settings['operator'].startswith('SlimBlock')


def test_a_backbones_own_checkpoint_will_do(tiny_config, saved, tmp_path):
    weights = torch.load(saved, weights_only=True)['state_dict']
    torch.save({key[9:]: value for key, value in weights.items() if key.startswith('backbone.')}, tmp_path / 'b.pth')
    cfg = load_config(tiny_config(BASELINE))
    _, errors = choose_blocks(cfg, str(tmp_path / 'b.pth'), 0.3, batches=1)
    assert errors == choose_blocks(cfg, saved, 0.3, batches=1)[1]


def test_frozen_stages_are_left_alone(tiny_config, saved):
    cfg = load_config(tiny_config(BASELINE), {'model.backbone.frozen_stages': 2})
    assert {name.split('.')[0] for name in choose_blocks(cfg, saved, 0.3, batches=1)[1]} == {'layer3', 'layer4'}


def test_calibration_batches_are_normalised_and_the_same_at_every_call(tiny_config):
    cfg = load_config(tiny_config(BASELINE))
    first, again = calibration_batches(cfg, 2), calibration_batches(cfg, 2)
    assert [tuple(batch.shape) for batch in first] == [(2, 3, 128, 128)] * 2
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert all(batch.is_floating_point() and batch.abs().max() < 5 for batch in first)


def test_calibration_batches_are_as_many_as_there_are(tiny_config):
    assert len(calibration_batches(load_config(tiny_config(BASELINE)), 100)) == 3


def test_table_has_every_block_with_its_error_or_reason(tiny_config, saved):
    report, errors = choose_blocks(load_config(tiny_config(BASELINE)), saved, 0.3, batches=1)
    table = error_table(report, errors)
    cells = [list(column.cells) for column in table.columns]
    assert len(cells[0]) == 16
    assert cells[4].count('') == 16 - len(errors)
    assert sum('replace[' in cell for cell in cells[5]) == sum(row.replaced for row in report.rows)
    assert "can't be replaced: no kept block before it in its stage" in cells[5]


def test_report_can_be_pasted(tiny_config, saved):
    report, _ = choose_blocks(load_config(tiny_config(BASELINE)), saved, 0.3, batches=1)
    cfg = load_config(tiny_config())
    cfg.model.backbone.replacement.plan = eval(report.as_plan)
    assert build_model(cfg).backbone.replacement_report.replaced == report.replaced
    assert Blocks(eval(report.as_plan)['blocks'])


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(p=0.), 'p must be a number above 0 and at most 1'),
    (dict(batches=0), '--batches must be at least 1, got 0'),
    (dict(fusion='Nothing'), "unknown type 'Nothing'; allowed: ChannelFusion"),
    (dict(operator='{"type": '), r"--operator: not a JSON object \(.*--operator '\{\"type\": \"NAME\"\}'"),
    (dict(fusion='{"type": "ScalarFusion", "init": "x"}'), 'init must be a finite number'),
])
def test_wrong_arguments(tiny_config, saved, arguments, message):
    with pytest.raises(UserError, match=message):
        choose_blocks(load_config(tiny_config(BASELINE)), saved, **dict(dict(p=0.3, batches=1), **arguments))


@pytest.mark.parametrize(('options', 'message'), [
    ({'model.backbone': None}, 'model.backbone is missing'),
    ({'model.backbone.type': 'NoNet'}, "unknown type 'NoNet'"),
    ({'train_dataloader': None}, 'it has no train_dataloader'),
    ({'model.backbone.frozen_stages': 4}, 'replaces no block of this model'),
])
def test_wrong_configs(tiny_config, saved, options, message):
    cfg = load_config(tiny_config(BASELINE))
    for key, value in options.items():
        cfg.merge_from_dict({key: value})
    with pytest.raises(UserError, match=message):
        choose_blocks(cfg, saved, 0.3, batches=1)


def test_missing_data_is_named(tiny_config, saved):
    cfg = load_config(tiny_config(BASELINE))
    dataset = dict(type='CocoDataset', data_root='nowhere/', ann_file='train.json', data_prefix=dict(img='images/'))
    cfg.train_dataloader.dataset = dataset
    with pytest.raises(UserError, match=r'train_dataloader.dataset.ann_file: nowhere/train.json doesn\'t exist'):
        choose_blocks(cfg, saved, 0.3)


def test_a_checkpoint_that_is_not_there(tiny_config):
    with pytest.raises(UserError, match='nothing.pth: there is no such checkpoint file'):
        choose_blocks(load_config(tiny_config(BASELINE)), 'nothing.pth', 0.3)


def test_a_checkpoint_of_another_architecture(tiny_config, tmp_path):
    torch.save({'backbone.conv1.weight': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(UserError, match=r"tensors don't fit the model"):
        choose_blocks(load_config(tiny_config(BASELINE)), str(tmp_path / 'other.pth'), 0.3)


def test_a_replaced_models_checkpoint_is_refused(tiny_config, tmp_path):
    torch.save(build_model(load_config(tiny_config())).state_dict(), tmp_path / 'replaced.pth')
    with pytest.raises(UserError, match='materialize it first'):
        choose_blocks(load_config(tiny_config()), str(tmp_path / 'replaced.pth'), 0.3)


def test_a_checkpoint_that_needs_code_is_refused(tiny_config, tmp_path):
    torch.save({'state_dict': {}, 'code': re.compile}, tmp_path / 'code.pth')
    with pytest.raises(UserError, match='add --allow-pickle'):
        choose_blocks(load_config(tiny_config(BASELINE)), str(tmp_path / 'code.pth'), 0.3)
