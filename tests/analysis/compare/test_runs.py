"""Trainings of a comparison: reused, resumed, reported; with stand-ins for the tools."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl_mmdet.analysis.compare import Tools, collect, only_one, train_all
from rl_mmdet.analysis.compare.report import write_report
from rl_mmdet.analysis.compare.runs import checkpoint_of, matches_of, scores_of
from rl_mmdet.engine import UserError


def calls(run):
    return (run.folder / 'calls.txt').read_text().splitlines()


def test_every_run_is_trained_with_its_seed_and_scored_and_a_failing_one_does_not_stop_the_others(comparison, tools):
    said = []
    failed = train_all(comparison, tools, said.append)
    assert [str(run) for run in failed] == ['twin, seed 1']
    runs = {str(run): run for run in comparison.runs()}
    assert 'out of luck' in (runs['twin, seed 1'].folder / 'error.txt').read_text()
    assert scores_of(runs['twin, seed 1']) is None
    assert scores_of(runs['base, seed 1'])['bbox'].ap == pytest.approx(1)
    assert matches_of(runs['base, seed 1'], 'bbox').hit.all()
    assert checkpoint_of(runs['base, seed 1']).name == 'epoch_1.pth'
    arguments = calls(runs['base, seed 1'])[0].split()
    assert arguments[0] == str(comparison.config_file('base'))
    assert '--resume' in arguments
    assert arguments[-2:] == ['--cfg-options', 'randomness.seed=1']
    assert any('FAILED, the others go on' in line and 'out of luck' in line for line in said)
    assert any(line.startswith('[1/4] base, seed 0: Epoch(train) [1][ 1/2] loss 1.500; all in about 4 min')
               for line in said)


def test_no_detections_count_as_ap_0_with_a_note(comparison, tools):
    train_all(comparison, tools, str)
    scores = scores_of(comparison.runs()[1])['bbox']
    assert scores.ap == 0
    assert 'no detections' in ' '.join(scores.notes)


def test_a_second_call_reuses_finished_runs_and_tries_failed_ones_again(comparison, tools):
    train_all(comparison, tools, str)
    Path('mended').touch()
    said = []
    assert train_all(comparison, tools, said.append) == []
    runs = {str(run): run for run in comparison.runs()}
    assert len(calls(runs['base, seed 0'])) == 1
    assert len(calls(runs['twin, seed 1'])) == 2
    assert not (runs['twin, seed 1'].folder / 'error.txt').exists()
    assert '[1/4] base, seed 0: finished before' in said


def test_after_kill_9_no_training_is_left_behind_and_the_next_call_goes_on(comparison, tools, tmp_path):
    script = tmp_path / 'call.py'
    script.write_text('from pathlib import Path\nfrom rl_mmdet.analysis.compare import *\n'
                      f'folder = Path({str(comparison.folder)!r})\nwith only_one(folder):\n'
                      f'    train_all(Comparison(folder), Tools(Path({str(tools.folder)!r})), print)\n')
    process = subprocess.Popen([sys.executable, str(script)], env=dict(os.environ, SLOW='60'))
    first = comparison.runs()[0]
    wait_for(lambda: (first.folder / 'calls.txt').is_file())
    with pytest.raises(UserError, match='another comparison is at work in it'), only_one(comparison.folder):
        pass
    trainings = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(Path(f'/proc/{pid}').exists() for pid in trainings))
    with only_one(comparison.folder):
        train_all(comparison, tools, str)
    assert scores_of(first)['bbox'].ap == pytest.approx(1)
    assert len(calls(first)) == 2


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(.05)


def children(pid):
    return [int(each) for each in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def test_a_training_without_checkpoint_is_a_failure(comparison, tools):
    (tools.folder / 'train.py').write_text('')
    assert len(train_all(comparison, tools, str)) == 4
    assert 'left no checkpoint' in (comparison.runs()[0].folder / 'error.txt').read_text()


def test_detections_that_cannot_be_scored_are_a_failure_in_one_line(comparison, tools):
    comparison.classes = [*comparison.classes, 'ten']
    said = []
    assert len(train_all(comparison, tools, said.append)) == 4
    complaint = (comparison.runs()[0].folder / 'error.txt').read_text()
    assert complaint.startswith("the bbox detections can't be scored: classes ['ten'] are not among the categories")
    assert complaint.count('\n') == 1
    assert f'[1/4] base, seed 0: FAILED, the others go on: {complaint.strip()}' in said
    assert collect(comparison).runs[0].status == 'failed'


def test_detections_that_were_not_written_are_a_failure(comparison, tools):
    (tools.folder / 'test.py').write_text('')
    assert len(train_all(comparison, tools, str)) == 4
    assert "can't be scored" in (comparison.runs()[0].folder / 'error.txt').read_text()


def test_a_val_set_without_objects_has_no_ap(comparison, tools, tmp_path):
    path = comparison.annotations()
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(annotations=[])))
    said = []
    failed = train_all(comparison, tools, said.append)
    assert [str(run) for run in failed] == ['twin, seed 1']
    assert '[1/4] base, seed 0: bbox AP –' in said
    write_report(comparison, contents := collect(comparison), tmp_path / 'report')
    assert contents.baseline.scores['bbox']['ap'] is None


def test_runs_that_were_finished_before_or_failed_tell_nothing_about_the_time_left(comparison, tools):
    train_all(comparison, tools, str)
    said = []
    train_all(comparison, tools, said.append)
    assert '[4/4] twin, seed 1: Epoch(train) [1][ 1/2] loss 1.500; all in about 1 min' in said


def test_torchrun_gets_the_number_of_processes_and_the_tool_its_launcher():
    command = Tools(Path('tools'), 'pytorch', 2).command('train', 'a.py', '--resume')
    assert command == ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', 'tools/train.py', 'a.py',
                       '--resume', '--launcher', 'pytorch']


@pytest.mark.parametrize('arguments', [('none', 2), ('pytorch', 0)])
def test_a_number_of_processes_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(UserError, match='--processes'):
        Tools(Path('tools'), *arguments)


def test_scores_are_saved_as_they_were_found(comparison, tools):
    train_all(comparison, tools, str)
    run = comparison.runs()[0]
    saved = json.loads((run.folder / 'scores.json').read_text())['bbox']
    assert saved['ap'] == scores_of(run)['bbox'].ap
    assert list(saved['per_class']) == comparison.classes
