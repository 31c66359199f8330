"""tools/check_zoo.py as a user calls it."""
from pathlib import Path

import pytest


@pytest.fixture
def run(run_tool):
    return run_tool('check_zoo')


def test_check_zoo_writes_page_and_record_and_goes_on_from_it(run):
    args = ('--configs', 'centernet/centernet_r18_*crop512*', '--workers', '1', '--json', 'zoo.jsonl', '--out',
            'zoo.md')
    status, captured = run(*args)
    assert status == 0
    assert '(of 1): baseline runs, RL no replaceable block: ' in captured.out
    assert 'Of 1 configs (1 distinct models) 1 run as they are, 0 don\'t, and ' in captured.out
    page = Path('zoo.md').read_text()
    assert "Made by `python tools/check_zoo.py --configs 'centernet/centernet_r18_*crop512*' --workers 1" in page

    status, captured = run(*args)
    assert status == 0
    assert '1 distinct models, 0 of them to be run' in captured.out
    assert Path('zoo.md').read_text() == page


@pytest.mark.parametrize(('args', 'message'), [
    (['--configs', 'nothing/*'], 'error: --configs nothing/*: no config of mmdet matches'),
    (['--sample', '1000'], 'error: --sample 1000: must be from 1 to '),
    (['--sample', '40', '--out', 'zoo.md'], 'error: --sample is a quick check of which no record is kept'),
    (['--configs', 'ssd/*', '--workers', '0'], 'error: --workers 0: must be at least 1')])
def test_check_zoo_says_what_is_wrong_in_one_line(run, args, message):
    status, captured = run(*args)
    assert status == 1
    assert captured.err.startswith(message)
    assert 'Traceback' not in captured.err
