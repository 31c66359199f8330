"""benchmarks/check_zoo.py as a user calls it."""
from functools import partial
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / 'benchmarks' / 'check_zoo.py'
CHEAP = 'centernet/centernet_r18_*crop512*'


@pytest.fixture
def run(run_script):
    return partial(run_script, PROGRAM)


def test_writes_page_and_record_and_goes_on_from_the_record(run):
    arguments = ('--configs', CHEAP, 'common/ms_3x*', '--workers', '1', '--json', 'new/zoo.jsonl', '--out', 'zoo.md')
    status, captured = run(*arguments)
    assert status == 0
    assert '[1/1] ' in captured.out and '(of 1): baseline runs, RL no replaceable block: ' in captured.out
    page = Path('zoo.md').read_text()
    assert f"Made by `python benchmarks/check_zoo.py --configs '{CHEAP}' 'common/ms_3x*' --workers 1" in page
    assert '| centernet | 1 | 1 | 0 | 1 | 0 |  |\n' in page

    record = Path('new/zoo.jsonl')
    record.write_text(record.read_text() + '{"key": "cut o')
    status, captured = run(*arguments)
    assert status == 0
    assert ' distinct models, 0 of them to be run' in captured.out
    assert Path('zoo.md').read_text() == page

    record.write_text(record.read_text().replace('"torch": "', '"torch": "0.'))  # results of another version
    status, captured = run(*arguments, '--stop-after', '0')
    assert ' distinct models, 1 of them to be run' in captured.out
    assert '## Not tried\n\n- no time for it yet (1): `centernet/' in Path('zoo.md').read_text()


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--configs', 'ssd/*', 'nothing/*'], '--configs nothing/*: no config of mmdet matches; names look like '),
    (['--sample', '1000'], '--sample 1000: must be from 1 to '),
    (['--sample', '40', '--out', 'zoo.md'], '--sample is a quick check of which no record is kept')])
def test_wrong_input_is_one_line(run, arguments, message):
    status, captured = run(*arguments)
    assert status == 1
    assert captured.err.startswith(f'error: {message}')
    assert captured.err.count('\n') == 1


@pytest.mark.slow
def test_the_sample_runs_with_replaced_blocks_or_has_none_to_replace(run):
    status, captured = run('--sample', '51')
    assert status == 0, captured.err
    assert "Of 51 configs (51 distinct models) 51 run as they are, 0 don't" in captured.out
