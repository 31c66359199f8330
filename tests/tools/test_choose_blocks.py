"""tools/choose_blocks.py as a user calls it, on a tiny detector."""

import pytest
import torch

from rl_mmdet.engine import build_model, load_config

BASELINE = 'atss_r34_fpn_digits.py'


@pytest.fixture
def run(run_tool):
    return run_tool('choose_blocks')


@pytest.mark.parametrize('config', [BASELINE, 'atss_rl-r34-k2_fpn_digits.py'])
def test_prints_every_block_and_the_plan_to_paste(run, tiny_config, randomise_, config):
    torch.save(randomise_(build_model(load_config(tiny_config(BASELINE)))).state_dict(), 'baseline.pth')
    status, captured = run(tiny_config(config), 'baseline.pth', '--p', '0.25', '--batches', '1')
    assert status == 0
    assert captured.out.count('BasicBlock') == 16
    line = captured.out.strip().splitlines()[-1]
    plan = eval(line.removeprefix('plan='))
    cfg = load_config(tiny_config())
    cfg.model.backbone.replacement.plan = plan
    assert build_model(cfg).backbone.replacement_report.replaced == plan['blocks']


@pytest.mark.parametrize(('args', 'message'), [
    (['nothing.pth', '--p', '0.25'], 'nothing.pth: there is no such checkpoint file'),
    (['nothing.pth', '--p', '0.25', '--batches', '0'], '--batches must be at least 1'),
])
def test_a_mistake_is_one_line_without_traceback(run, tiny_config, args, message):
    status, captured = run(tiny_config(), *args)
    assert status == 1
    assert captured.err.startswith('error: ')
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_a_missing_config_is_one_line(run):
    status, captured = run('nothing.py', 'nothing.pth', '--p', '0.25')
    assert status == 1
    assert captured.err.startswith('error: config nothing.py')
