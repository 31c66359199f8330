"""Trainings of a comparison: reused, resumed, reported; with stand-ins for the tools."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rl_mmdet.analysis.compare import Tools, carry_out, collect, plan_comparison, runs
from rl_mmdet.analysis.compare.comparison import only_one
from rl_mmdet.analysis.compare.report import write_report
from rl_mmdet.analysis.compare.runs import _val_config, checkpoint_of, run_process, scores_of, train_all
from rl_mmdet.engine import UserError

MORE = {'more': {'optim_wrapper.optimizer.lr': 0.5}}


def calls(run):
    return (run.folder / 'calls.txt').read_text().splitlines()


def complaint(run):
    return (run.folder / 'error.txt').read_text()


def test_every_run_is_trained_with_its_seed_and_scored_and_a_failing_one_does_not_stop_the_others(finished):
    comparison, said = finished
    runs = {str(run): run for run in comparison.runs()}
    assert [name for name, run in runs.items() if scores_of(run) is None] == ['twin, seed 1']
    assert 'out of luck' in complaint(runs['twin, seed 1'])
    base = runs['base, seed 1']
    assert scores_of(base)['bbox'].ap == pytest.approx(1)
    assert checkpoint_of(base).name == 'epoch_1.pth'
    arguments = calls(base)[0].split()
    assert arguments[0] == str(comparison.config_file('base'))
    assert '--resume' in arguments and arguments[-2:] == ['--cfg-options', 'randomness.seed=1']
    assert any('FAILED, the others go on' in line and 'out of luck' in line for line in said)
    assert 'base, seed 0: bbox AP 1.000' in said
    nothing = scores_of(runs['twin, seed 0'])['bbox']
    assert nothing.ap == 0 and 'no detections' in ' '.join(nothing.notes)


def test_a_second_call_reuses_finished_runs_and_tries_failed_ones_again(comparison, tools, capsys):
    train_all(comparison, tools, str)
    Path('mended').touch()
    capsys.readouterr()
    train_all(comparison, tools, str)
    runs = {str(run): run for run in comparison.runs()}
    assert all(scores_of(run) for run in runs.values())
    assert len(calls(runs['base, seed 0'])) == 1 and len(calls(runs['twin, seed 1'])) == 2
    assert not (runs['twin, seed 1'].folder / 'error.txt').exists()
    bar = capsys.readouterr().err
    assert all(part in bar for part in ('3.00/4', '4.00/4', 'twin, seed 1', 'loss 1.5'))


def test_trainings_side_by_side_are_all_done_and_a_failing_one_does_not_stop_the_others(comparison, tools, capfd):
    train_all(comparison, replace(tools, jobs=3), print)
    runs = {str(run): run for run in comparison.runs()}
    assert [name for name, run in runs.items() if scores_of(run) is None] == ['twin, seed 1']
    assert 'out of luck' in complaint(runs['twin, seed 1'])
    assert 'base, seed 1: bbox AP 1.000' in capfd.readouterr().out
    with pytest.raises(UserError, match='--jobs must be at least 1, got 0'):
        replace(tools, jobs=0)


def test_a_process_that_dies_is_a_failure_of_its_runs_that_the_report_names(comparison, tools, tmp_path, monkeypatch):
    work = runs._train_some
    monkeypatch.setattr(runs, '_train_some', lambda *args: os._exit(9) if args[-1] else work(*args))
    with pytest.raises(UserError, match=r'2 failed.*twin, seed 0: its process ended with status 9'):
        carry_out(comparison, replace(tools, jobs=2), tmp_path / 'report', measure_costs=False)
    assert 'its process ended with status 9' in (tmp_path / 'report' / 'report.md').read_text()
    assert scores_of(comparison.runs()[0])['bbox'].ap == pytest.approx(1)


def test_what_was_not_foreseen_in_a_run_is_its_failure_and_the_others_go_on(comparison, tools, monkeypatch):
    monkeypatch.setattr(runs, 'score_detections', lambda *_: 1 / 0)
    train_all(comparison, tools, str)
    assert [complaint(run) for run in comparison.runs()][:2] == ['ZeroDivisionError: division by zero\n'] * 2


def test_output_that_is_not_utf_8_is_shown_as_far_as_it_is(tmp_path):
    lines = []
    run_process(['-c', 'import os; os.write(1, b"caf\\xe9\\n"); print("trained")'], tmp_path / 'log', lines.append)
    assert lines == ['caf\ufffd\n', 'trained\n'] and (tmp_path / 'log').read_text(encoding='utf-8') == ''.join(lines)


def test_the_val_set_is_run_with_the_evaluators_own_settings(tiny_config, tmp_path):
    options = {'val_evaluator.sort_categories': True, 'val_evaluator.proposal_nums': (1, 10, 100)}
    comparison = plan_comparison(tmp_path / 'work', [tiny_config('atss_r34_fpn_digits.py')], MORE, 1, options)
    evaluator = _val_config(comparison, comparison.runs()[1]).test_evaluator
    assert evaluator.sort_categories is True and evaluator.proposal_nums == (1, 10, 100)
    assert evaluator.format_only is True and evaluator.metric == ['bbox']


def test_after_kill_9_no_training_is_left_behind_and_the_next_call_goes_on(
        comparison, tools, tiny_config, tmp_path):
    script = tmp_path / 'call.py'
    script.write_text('from pathlib import Path\nfrom rl_mmdet.analysis.compare import Comparison, Tools, carry_out\n'
                      f'folder = Path({str(comparison.folder)!r})\n'
                      f'carry_out(Comparison(folder), Tools(Path({str(tools.folder)!r})), folder)\n')
    process = subprocess.Popen([sys.executable, str(script)],
                               env=dict(os.environ, SLOW='60', PYTHONPATH=os.pathsep.join(sys.path)))
    first = comparison.runs()[0]
    wait_for(lambda: (first.folder / 'calls.txt').is_file() or process.poll() is not None)
    with pytest.raises(UserError, match='another comparison is at work in it'), only_one(comparison.folder):
        pass
    before = (comparison.folder / 'comparison.json').read_text()
    with pytest.raises(UserError, match='another comparison is at work in it'):
        plan_comparison(comparison.folder, [f'base={tiny_config("atss_r34_fpn_digits.py")}'], MORE)
    assert (comparison.folder / 'comparison.json').read_text() == before
    trainings = [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
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


@pytest.mark.parametrize(('tool', 'message'), [
    ('train', 'the training left no checkpoint'), ('test', "the bbox detections can't be scored: [Errno 2]")])
def test_a_tool_that_leaves_nothing_behind_is_a_failure(comparison, tools, tool, message):
    (tools.folder / f'{tool}.py').write_text('')
    train_all(comparison, tools, str)
    assert message in complaint(comparison.runs()[0])


def test_detections_that_cannot_be_scored_are_a_failure_in_one_line(comparison, tools):
    comparison.classes = [*comparison.classes, 'ten']
    said = []
    train_all(comparison, tools, said.append)
    text = complaint(comparison.runs()[0])
    assert text.startswith("the bbox detections can't be scored: classes ['ten'] are not among the categories")
    assert f'base, seed 0: FAILED, the others go on: {text.strip()}' in said
    assert text.count('\n') == 1
    assert collect(comparison).runs[0].status == 'failed'


def test_a_val_set_without_objects_has_no_ap(comparison, tools, tmp_path):
    path = comparison.annotations()
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(annotations=[])))
    said = []
    train_all(comparison, tools, said.append)
    assert 'base, seed 0: bbox AP –' in said
    write_report(contents := collect(comparison), tmp_path / 'report')
    assert contents.baseline.scores['bbox']['ap'] is None


def test_torchrun_gets_the_number_of_processes_and_the_tool_its_launcher():
    command = Tools(Path('tools'), 'pytorch', 2).command('train', 'a.py', '--resume')
    assert command == ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', 'tools/train.py', 'a.py',
                       '--resume', '--launcher', 'pytorch']
    for arguments in (('none', 2), ('pytorch', 0)):
        with pytest.raises(UserError, match='--processes'):
            Tools(Path('tools'), *arguments)
