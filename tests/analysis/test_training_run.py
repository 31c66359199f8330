"""One training as a process: its end, its failure, and what it has cost."""
import json

import pytest

from rl_mmdet.analysis import run_training
from rl_mmdet.engine import UserError


def script(tmp_path, text):
    path = tmp_path / 'script.py'
    path.write_text(text)
    return [str(path)]


def test_run_training_tells_progress_and_keeps_the_cost(tmp_path):
    said = []
    command = script(tmp_path, 'print("env noise")\nprint("x - INFO - Epoch(train)  [1][ 1/2]   loss: 1.0")')
    cost = run_training(command, tmp_path / 'work', said.append)
    assert said == ['Epoch(train) [1][ 1/2] loss: 1.0']
    assert cost.finished
    assert cost.seconds > 0
    assert cost.peak_rss > 2**20
    assert json.loads((tmp_path / 'work' / 'cost.json').read_text())['finished'] is True
    assert 'env noise' in (tmp_path / 'work' / 'output.log').read_text()


def test_run_training_that_has_finished_is_not_run_again(tmp_path):
    command = script(tmp_path, f'open({str(tmp_path / "count")!r}, "a").write("x")')
    for _ in range(2):
        run_training(command, tmp_path / 'work', str)
    assert (tmp_path / 'count').read_text() == 'x'


def test_run_training_that_fails_shows_the_end_of_its_output_and_is_run_again(tmp_path):
    command = script(tmp_path, 'import sys\nprint("error: no such data")\nsys.exit(3)')
    with pytest.raises(UserError, match='status 3(.|\n)*no such data'):
        run_training(command, tmp_path / 'work', str)
    first = json.loads((tmp_path / 'work' / 'cost.json').read_text())
    assert first['finished'] is False
    cost = run_training(script(tmp_path, 'pass'), tmp_path / 'work', str)
    assert cost.finished
    assert cost.seconds > first['seconds']


def test_run_training_interrupted_ends_the_process_and_keeps_its_cost(tmp_path):
    command = script(tmp_path, 'import time\nprint("Epoch(train) 1", flush=True)\ntime.sleep(60)')

    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(command, tmp_path / 'work', interrupt)
    assert json.loads((tmp_path / 'work' / 'cost.json').read_text())['finished'] is False
