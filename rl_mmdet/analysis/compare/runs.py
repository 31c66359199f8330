"""The trainings of a comparison, one after the other: trained, run on the val set, scored."""
import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from ...engine import UserError, checkpoints_in
from ...engine.files import read_record, write_text
from ..training_run import end_with_parent, run_training
from .coco_scores import Matches, Scores, score_detections
from .comparison import Comparison, Run
from .progress import Progress, Say

LAUNCHERS = ('none', 'pytorch')


@dataclass(frozen=True)
class Tools:
    """How trainings are started.

    Args:
        folder: where train.py and test.py are.
        launcher: ``'none'``, or ``'pytorch'``: torchrun on this machine.
        processes: how many torchrun starts; None for one on each GPU.
        jobs: how many trainings run side by side, on the same device.
        options: of train.py and test.py, about the checkpoints that they read.

    Raises:
        UserError: ``processes`` without torchrun, or a number below 1.
    """
    folder: Path
    launcher: str = 'none'
    processes: int | None = None
    jobs: int = 1
    options: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f'--jobs must be at least 1, got {self.jobs}')
        if self.processes is not None and (self.launcher == 'none' or self.processes < 1):
            raise UserError(f'--processes {self.processes}: must be at least 1, and goes with --launcher pytorch')

    def command(self, tool: str, *arguments: object) -> list[str]:
        """Arguments for this Python."""
        start = [str(self.folder / f'{tool}.py'), *map(str, arguments), *self.options]
        if self.launcher == 'none':
            return start
        count = self.processes or max(1, torch.cuda.device_count())
        return ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={count}', *start,
                '--launcher', self.launcher]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep the folder of a comparison for this process.

    Raises:
        UserError: another process works in it.
    """
    with (folder / '.lock').open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f'--work-dir {folder}: another comparison is at work in it; wait for its end') from None
        yield


def train_all(comparison: Comparison, tools: Tools, say: Say) -> None:
    """Train and score every run that isn't finished yet.

    Of a run that fails ``error.txt`` in its folder says why, and the others go on.

    Args:
        comparison: which runs.
        tools: how to start them.
        say: gets one line whenever there is progress.
    """
    runs = comparison.runs()
    if tools.jobs == 1:
        _train_some(comparison, runs, tools, say)
        return
    # Processes, not threads: a training ends with the thread that has started it.
    workers = [get_context('fork').Process(target=_work, args=(comparison, runs[first::tools.jobs], tools, say))
               for first in range(min(tools.jobs, len(runs)))]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        for worker in workers:
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGINT)
            worker.join()
        raise


def _work(*arguments: Any) -> None:
    """A process that trains some of the runs."""
    end_with_parent()
    with contextlib.suppress(KeyboardInterrupt):
        _train_some(*arguments)


def _train_some(comparison: Comparison, runs: Sequence[Run], tools: Tools, say: Say) -> None:
    """Train and score some of the runs, one after the other."""
    progress = Progress(comparison.runs(), say, tools.jobs)
    for run in runs:
        _train(comparison, run, tools, progress)


def _train(comparison: Comparison, run: Run, tools: Tools, progress: Progress) -> None:
    """Train and score one run, unless that is done."""
    finished = scores_of(run) is not None
    progress.begin(run, None if finished else comparison.config(run.variant).train_cfg.get('max_epochs'))
    if finished:
        progress.phase('finished before')
        return
    complaint = run.folder / 'error.txt'
    complaint.unlink(missing_ok=True)
    try:
        scores = _finish(comparison, run, tools, progress)
    except UserError as error:
        write_text(complaint, f'{error}\n')
        progress.phase(f'FAILED, the others go on: {str(error).splitlines()[-1]}')
    else:
        progress.phase(', '.join(f'{metric} AP {"–" if each.ap is None else f"{each.ap:.3f}"}'
                                 for metric, each in scores.items()))


def scores_of(run: Run) -> dict[str, Scores] | None:
    """The run's scores by metric, None as long as it isn't finished."""
    path = run.folder / 'scores.json'
    if not path.is_file():
        return None
    return read_record(path, lambda content: {metric: Scores(**scores | dict(notes=tuple(scores['notes'])))
                                              for metric, scores in content.items()})


def matches_of(run: Run, metric: str) -> Matches:
    """What the run's AP is computed from."""
    return Matches.load(run.folder / f'matches_{metric}.npz')


def checkpoint_of(run: Run) -> Path | None:
    """The last checkpoint, if there is one."""
    return next(iter(checkpoints_in(run.folder)), None)


def _finish(comparison: Comparison, run: Run, tools: Tools, progress: Progress) -> dict[str, Scores]:
    """Do what is left to do of one run; its scores by metric."""
    progress.phase('training')
    run_training(tools.command('train', comparison.config_file(run.variant), '--work-dir', run.folder, '--resume',
                               '--cfg-options', f'randomness.seed={run.seed}'), run.folder, progress.line)
    checkpoint = checkpoint_of(run)
    if checkpoint is None:
        raise UserError(f'{run.folder}: the training left no checkpoint; delete the folder and start again')
    progress.phase('running the last checkpoint on the val set')
    evaluation = run.folder / 'evaluation'
    evaluation.mkdir(exist_ok=True)
    write_text(evaluation / 'config.py', _val_config(comparison, run).pretty_text)
    run_training(tools.command('test', evaluation / 'config.py', checkpoint, '--work-dir', evaluation),
                 evaluation, progress.line)
    progress.phase('scoring its detections')
    scores = {}
    for metric in comparison.metrics():
        detections = run.folder / f'detections.{metric}.json'
        try:
            scores[metric], matches = score_detections(comparison.annotations(), detections, metric, comparison.classes)
        except (ValueError, OSError) as error:
            raise UserError(f'the {metric} detections can\'t be scored: {error}') from error
        matches.save(run.folder / f'matches_{metric}.npz')
    write_text(run.folder / 'scores.json', json.dumps({m: asdict(s) for m, s in scores.items()}, indent=2))
    return scores


def _val_config(comparison: Comparison, run: Run) -> Config:
    """The variant's config, testing on the val set, with detections written instead of evaluated."""
    cfg = comparison.config(run.variant)
    cfg.test_dataloader = cfg.val_dataloader
    cfg.test_cfg = dict(cfg.get('val_cfg') or {}, type='TestLoop')
    cfg.test_evaluator = dict(type='mmdet.CocoMetric', ann_file=str(comparison.annotations()), format_only=True,
                              metric=comparison.metrics(), outfile_prefix=str(run.folder / 'detections'))
    return cfg

