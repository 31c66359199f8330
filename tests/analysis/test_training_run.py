"""One training as a process: its end, its failure, and what it has cost."""
import json

import pytest

from rl_mmdet.analysis import run_training
from rl_mmdet.engine import UserError


@pytest.fixture
def run(tmp_path):
    def training(text, say=str):
        (tmp_path / 'script.py').write_text(text)
        return run_training([str(tmp_path / 'script.py')], tmp_path / 'work', say)
    return training


def recorded(tmp_path):
    return json.loads((tmp_path / 'work' / 'cost.json').read_text())


def test_run_training_tells_progress_keeps_the_cost_and_is_not_run_again(run, tmp_path):
    said, text = [], f'open({str(tmp_path / "count")!r}, "a").write("x")\nprint("env noise")\n'
    for _ in range(2):
        cost = run(text + 'print("x - INFO - Epoch(train)  [1][ 1/2]   loss: 1.0")', said.append)
    assert said == ['Epoch(train) [1][ 1/2] loss: 1.0']
    assert (tmp_path / 'count').read_text() == 'x'
    assert cost.finished and cost.seconds > 0 and cost.peak_rss > 2**20
    assert recorded(tmp_path)['finished'] is True
    assert 'env noise' in (tmp_path / 'work' / 'output.log').read_text()


def test_run_training_that_fails_shows_the_end_of_its_output_and_is_run_again(run, tmp_path):
    with pytest.raises(UserError, match='status 3(.|\n)*no such data'):
        run('import sys\nprint("error: no such data")\nsys.exit(3)')
    first = recorded(tmp_path)
    assert first['finished'] is False
    cost = run('pass')
    assert cost.finished and cost.seconds > first['seconds']


def test_run_training_interrupted_ends_the_process_and_keeps_its_cost(run, tmp_path):
    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run('import time\nprint("Epoch(train) 1", flush=True)\ntime.sleep(60)', interrupt)
    assert recorded(tmp_path)['finished'] is False
