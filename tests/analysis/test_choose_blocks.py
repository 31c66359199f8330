"""Which blocks of a trained backbone their neighbours explain best, on a config's own data."""
import re
from dataclasses import replace

import pytest
import torch

from rl_mmdet.analysis import choose_blocks, cost_line, error_table, warning_lines
from rl_mmdet.analysis.choose_blocks import calibration_batches
from rl_mmdet.engine import UserError, build_model, load_config
from rl_mmdet.replacement import replace_blocks_
from rl_mmdet.replacement.plans import BestFit

BASELINE = 'atss_r34_fpn_digits.py'


def with_operator(tiny_config, name):
    """The baseline's config with nothing said of the replacement but its operator."""
    return load_config(tiny_config(BASELINE), {'model.backbone.replacement.operator.type': name})


@pytest.fixture
def saved(tiny_config, randomise_, tmp_path):
    """The checkpoint of a tiny baseline detector."""
    detector = randomise_(build_model(load_config(tiny_config(BASELINE))))
    torch.save(dict(state_dict=detector.state_dict()), tmp_path / 'baseline.pth')
    return str(tmp_path / 'baseline.pth')


def test_choice_is_that_of_the_plan_on_the_same_batches_from_a_detectors_or_a_backbones_checkpoint(tiny_config, saved,
                                                                                                  tmp_path):
    cfg = load_config(tiny_config(BASELINE))
    trial = choose_blocks(cfg, saved, 0.3, batches=2, steps=3)
    weights = {key.removeprefix('backbone.'): value
               for key, value in torch.load(saved, weights_only=True)['state_dict'].items() if 'backbone.' in key}
    backbone = build_model(cfg).backbone
    backbone.load_state_dict(weights)
    plan = BestFit(0.3, calibration_batches(cfg, 2), steps=3)
    assert replace_blocks_(backbone, dict(plan=plan)).replaced == trial.report.replaced
    assert plan.errors == trial.errors
    torch.save(weights, tmp_path / 'backbone.pth')
    assert choose_blocks(cfg, str(tmp_path / 'backbone.pth'), 0.3, batches=2, steps=3).errors == trial.errors


def test_choice_of_a_replaced_config_is_that_of_its_baseline_with_its_fusion_and_operator(tiny_config, saved):
    replaced, options = load_config(tiny_config()), dict(batches=1, steps=0)
    trial = choose_blocks(replaced, saved, 0.3, **options)
    assert trial.errors == choose_blocks(load_config(tiny_config(BASELINE)), saved, 0.3, **options).errors
    replaced.model.backbone.replacement.fusion = dict(type='TransformFusion')
    assert choose_blocks(replaced, saved, 0.3, **options).report.settings['fusion'].startswith('TransformFusion')


def test_an_operator_has_its_cost(tiny_config, saved):
    full, skip = (choose_blocks(with_operator(tiny_config, name), saved, 0.3, batches=1, steps=0)
                  for name in ('FullBlock', 'Skip'))
    assert all(error == pytest.approx(1) for error in skip.errors.values())
    assert (full.report.learnable, skip.report.learnable) == (2 * sum(map(len, full.report.replaced.values())), 0)
    assert full.flops == 1 > skip.flops > 0.3
    line = cost_line(full)
    assert line.startswith('FullBlock(): 2 blocks of ')
    assert f'that learn {full.report.learnable}; forward FLOPs of the backbone ×1.00' in line


def test_an_operator_that_keeps_nothing_of_a_chosen_block_is_warned_of(tiny_config, saved):
    skip = choose_blocks(with_operator(tiny_config, 'Skip'), saved, 0.3, batches=1, steps=0)
    [line] = warning_lines(skip)
    chosen = [f'{stage}.{index} (1.00)' for stage, indices in skip.report.replaced.items() for index in indices]
    assert line.startswith('warning: Skip() is no better than leaving the block out in the place of ')
    assert len(chosen) == 2 and all(block in line for block in chosen)
    assert warning_lines(replace(skip, errors=dict.fromkeys(skip.errors, 0.9))) == []


def test_frozen_stages_are_left_alone(tiny_config, saved):
    cfg = load_config(tiny_config(BASELINE), {'model.backbone.frozen_stages': 2})
    trial = choose_blocks(cfg, saved, 0.3, batches=1, steps=0)
    assert {name.split('.')[0] for name in trial.errors} == {'layer3', 'layer4'}


def test_calibration_batches_are_normalised_and_the_same_at_every_call(tiny_config):
    cfg = load_config(tiny_config(BASELINE))
    first, again = calibration_batches(cfg, 2), calibration_batches(cfg, 100)
    assert [tuple(batch.shape) for batch in first] == [(2, 3, 128, 128)] * 2
    assert all(torch.equal(*pair) for pair in zip(first, again[:2], strict=True))
    assert all(batch.is_floating_point() and batch.abs().max() < 5 for batch in first)
    assert len(again) == 3  # as many as there are


def test_table_has_every_block_with_its_error_or_reason(tiny_config, saved):
    trial = choose_blocks(load_config(tiny_config(BASELINE)), saved, 0.3, batches=1, steps=0)
    report, errors = trial.report, trial.errors
    cells = [list(column.cells) for column in error_table(trial).columns]
    assert len(cells[0]) == 16
    assert cells[4].count('') == 16 - len(errors)
    assert sum('replaced[' in cell for cell in cells[5]) == len([row for row in report.rows if row.replaced]) > 0
    assert "can't be replaced: no kept block before it in its stage" in cells[7]


@pytest.mark.parametrize(('options', 'arguments', 'message'), [
    ({}, dict(p=0.), 'p must be a number above 0 and at most 1'),
    ({}, dict(batches=0), '--batches must be at least 1, got 0'),
    ({}, dict(steps=-1), 'BestFit: steps must be an integer of at least 0, got -1'),
    ({'model.backbone.replacement.fusion.type': 'Nothing'}, {}, "unknown type 'Nothing'; allowed: OwnWeights"),
    ({'model.backbone.replacement.fusion.init': 'x'}, {}, 'init must be a finite number'),
    ({'model.backbone': None}, {}, 'model.backbone is missing'),
    ({'model.bakbone.depth': 18}, {}, "doesn't read it; did you mean backbone"),
    ({'model.backbone.type': 'NoNet'}, {}, "unknown type 'NoNet'"),
    ({'train_dataloader': None}, {}, 'it has no train_dataloader'),
    ({'train_dataloader.dataset': dict(type='CocoDataset', data_root='nowhere/', ann_file='train.json',
                                       data_prefix=dict(img='images/'), _delete_=True)}, {},
     r"train_dataloader.dataset.ann_file: nowhere/train.json doesn't exist"),
    ({'model.backbone.frozen_stages': 4}, {}, 'replaces no block of this model'),
])
def test_wrong_settings_are_user_errors(tiny_config, saved, options, arguments, message):
    cfg = load_config(tiny_config(BASELINE))
    cfg.merge_from_dict(options)
    with pytest.raises(UserError, match=message):
        choose_blocks(cfg, saved, **dict(p=0.3, batches=1, steps=0) | arguments)


@pytest.mark.parametrize(('content', 'message'), [
    (None, 'weights.pth: there is no such checkpoint file'),
    ({'backbone.conv1.weight': torch.zeros(1)}, r"tensors don't fit the model"),
    ('replaced', 'materialize the checkpoint first'),
    ({'state_dict': {}, 'code': re.compile}, 'add --allow-pickle'),
])
def test_wrong_checkpoints_are_user_errors(tiny_config, tmp_path, content, message):
    if content is not None:
        content = build_model(load_config(tiny_config())).state_dict() if content == 'replaced' else content
        torch.save(content, tmp_path / 'weights.pth')
    with pytest.raises(UserError, match=message):
        choose_blocks(load_config(tiny_config(BASELINE)), str(tmp_path / 'weights.pth'), 0.3, batches=1)
