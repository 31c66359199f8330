"""benchmarks/gpu.py as a user calls it, in the part that needs no detector."""
import json
from pathlib import Path

import pytest

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
