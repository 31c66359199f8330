"""benchmarks/gpu.py as a user calls it, in the part that needs no detector."""
import argparse
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from gpu_runs import common, steps
from gpu_runs.variants import SMALL_CASES

PROGRAM = Path(__file__).resolve().parents[2] / 'benchmarks/gpu.py'
TESTS = """
import pytest

pytestmark = pytest.mark.gpu

def test_good():
    pass

def test_bad():
    assert 1 == 2, 'one is not two'

@pytest.mark.skip(reason='no such card')
def test_left_out():
    pass
"""


@pytest.mark.parametrize(('arguments', 'said'), [
    ((), 'torch finds no GPU here; allowed: cpu'),
    (('--device', 'cpu', '--minutes', '-1'), "'-1' is no number above 0"),
    (('--device', 'cpu', '--part', 'E'), "choose from 'A', 'B', 'C', 'D'"),
    (('--device', 'cpu', '--part', 'D'), '--part D: nothing to train on; give --cifar FILE, --bccd DIR, or'),
    (('--device', 'cpu', '--aquarium', 'folder'), '--aquarium and --weights: part D needs both'),
])
def test_wrong_input_is_one_line_and_nothing_is_written(run_script, monkeypatch, arguments, said):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    status, captured = run_script(PROGRAM, '--part', 'B', '--out', 'results', *arguments)
    assert status == 2
    assert captured.err.startswith('error: ') and said in captured.err and captured.err.count('\n') == 1
    assert not Path('results').exists()


def test_checks_say_why_a_test_did_not_pass(run_script, tmp_path):
    (tmp_path / 'test_some.py').write_text(TESTS)
    status, captured = run_script(PROGRAM, '--part', 'A', '--device', 'cpu', '--out', 'results', '--tests',
                                  tmp_path / 'test_some.py')
    assert status == 0
    assert '1 failed, 1 passed, 1 skipped of 3' in captured.out and 'one is not two' in captured.out
    found = json.loads(Path('results/gpu_checks.json').read_text())
    rows = {row['name'].rpartition('::')[2]: row for row in found['rows']}
    assert {name: row['result'] for name, row in rows.items()} == dict(
        test_good='passed', test_bad='failed', test_left_out='skipped')
    page = Path('results/gpu_checks.md').read_text()
    assert 'AssertionError: one is not two' in page and 'no such card' in page


@pytest.fixture
def measured(monkeypatch):
    """Write results of part B: the first rehearsed case complete, the second not."""
    def write(**environment):
        monkeypatch.setattr('sys.argv', ['benchmarks/gpu.py', '--before'])
        about = common.environment(argparse.Namespace(device='cpu')) | environment
        row = dict(times=[[2.]], host=[2.], ms=2., host_ms=2., parameters=1, flops=1, saved=1)
        cases = [dict(title=str(case), case=asdict(case), rows=dict(baseline=dict(row)),
                      regions={}, left_out=dict(left_out))
                 for case, left_out in zip(SMALL_CASES, ({}, dict(slim='no time')), strict=False)]
        Path('results').mkdir()
        Path('results/gpu_train_step.json').write_text(json.dumps(dict(
            environment=about, rates=dict(flops=1., bytes=1., size=1), rounds=5, cases=cases, not_run=[])))
    return write


def test_resumed_it_keeps_what_is_measured(run_script, measured):
    measured()
    status, captured = run_script(PROGRAM, '--part', 'B', '--device', 'cpu', '--small', '--cases', 1, '--resume',
                                  '--out', 'results')
    assert status == 0 and str(SMALL_CASES[1]) not in captured.out
    found = json.loads(Path('results/gpu_train_step.json').read_text())
    assert [case['title'] for case in found['cases']] == [*map(str, SMALL_CASES[:2])] and not found['not_run']
    page = Path('results/gpu_train_step.md').read_text()
    assert '`python benchmarks/gpu.py --before` and `python ' in page and '| baseline | 2.0 |' in page


def test_resumed_it_measures_what_is_not_complete(run_script, measured, monkeypatch):
    measured()
    monkeypatch.setattr(steps._Measurement, 'run', lambda self: self.left_out.update(baseline='seen again'))
    status, captured = run_script(PROGRAM, '--part', 'B', '--device', 'cpu', '--small', '--resume', '--out', 'results')
    assert status == 0
    found = json.loads(Path('results/gpu_train_step.json').read_text())
    assert [case['title'] for case in found['cases']] == [*map(str, SMALL_CASES)] and not found['not_run']
    assert [case['left_out'] for case in found['cases']] == [{}, *[dict(baseline='seen again')] * 3]


def test_results_of_another_card_are_not_resumed(run_script, measured):
    measured(device='NVIDIA Other')
    before = Path('results/gpu_train_step.json').read_text()
    status, _ = run_script(PROGRAM, '--part', 'B', '--device', 'cpu', '--small', '--resume', '--out', 'results')
    assert status.startswith('error: --resume: results/gpu_train_step.json is of another device: NVIDIA Other, not no')
    assert Path('results/gpu_train_step.json').read_text() == before and not Path('results/gpu_train_step.md').exists()
