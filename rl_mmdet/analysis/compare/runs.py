"""The trainings of a comparison, one after the other: trained, run on the val set, scored."""
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from tqdm import tqdm

from ...engine import UserError, checkpoints_in
from ...engine.files import read_record, write_text
from .bootstrap import resampled_precision
from .coco_scores import Scores, score_detections
from .comparison import Comparison, Run
from .same_question import coco_evaluator

EPOCH = re.compile(r'Epoch\(train\)\s*\[(\d+)\]\[\s*(\d+)/(\d+)\]')
ITERATION = re.compile(r'Iter\(train\)\s*\[\s*(\d+)/(\d+)\]')
LOSS = re.compile(r' loss: (\S+)')
Say = Callable[[str], None]
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None


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


def train_all(comparison: Comparison, tools: Tools, say: Say) -> None:
    """Train and score every run that isn't finished yet, with a bar that shows the time left for all of them.

    Of a run that fails ``error.txt`` in its folder says why, and the others go on.

    Args:
        comparison: which runs.
        tools: how to start them.
        say: gets a line whenever a run enters another phase.
    """
    runs = comparison.runs()
    if tools.jobs == 1:
        _train_some(comparison, runs, tools, say)
        return
    # Processes, not threads: a training ends with the thread that has started it.
    workers = [get_context('fork').Process(target=_work, args=(comparison, runs[first::tools.jobs], tools, say, first))
               for first in range(min(tools.jobs, len(runs)))]
    for worker in workers:
        worker.start()
    try:
        for first, worker in enumerate(workers):
            worker.join()
            for run in runs[first::tools.jobs] if worker.exitcode else ():
                if scores_of(run) is None and not complaint_of(run).is_file():
                    _complain(run, f'its process ended with status {worker.exitcode}')
    except KeyboardInterrupt:
        for worker in workers:
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGINT)
            worker.join()
        raise


def _work(*arguments: Any) -> None:
    """A process that trains some of the runs."""
    _end_with_parent()
    with contextlib.suppress(KeyboardInterrupt):
        _train_some(*arguments)


def _train_some(comparison: Comparison, runs: Sequence[Run], tools: Tools, say: Say, position: int = 0) -> None:
    """Train and score some of the runs, one after the other."""
    left = [run for run in runs if scores_of(run) is None]
    with tqdm(total=len(runs), initial=len(runs) - len(left), smoothing=0, miniters=0, mininterval=2, position=position,
              bar_format='{l_bar}{bar}| {n:.2f}/{total} [{elapsed}<{remaining}{postfix}]', disable=not left) as bar:
        for done, run in enumerate(left, 1):
            bar.set_description(str(run))
            complaint_of(run).unlink(missing_ok=True)
            try:
                scores = _finish(comparison, run, tools, lambda text, run=run: say(f'{run}: {text}'), bar)
            except Exception as error:
                text = str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}'
                _complain(run, text)
                say(f'{run}: FAILED, the others go on: {text.splitlines()[-1]}')
            else:
                say(f'{run}: ' + ', '.join(f'{metric} AP {"–" if each.ap is None else f"{each.ap:.3f}"}'
                                           for metric, each in scores.items()))
            bar.n = len(runs) - len(left) + done


def complaint_of(run: Run) -> Path:
    """Where it stands why a run has failed."""
    return run.folder / 'error.txt'


def _complain(run: Run, text: str) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(complaint_of(run), f'{text}\n')


def scores_of(run: Run) -> dict[str, Scores] | None:
    """The run's scores by metric, None as long as it isn't finished."""
    path = run.folder / 'scores.json'
    if not (path.is_file() and (run.folder / 'resampled.json').is_file()):
        return None
    return read_record(path, lambda content: {metric: Scores(**scores | dict(notes=tuple(scores['notes'])))
                                              for metric, scores in content.items()})


def resampled_of(run: Run, metric: str) -> np.ndarray:
    """The run's AP on resampled val images."""
    return read_record(run.folder / 'resampled.json', lambda content: np.array([*content[metric]], dtype=float))


def checkpoint_of(run: Run) -> Path | None:
    """The last checkpoint, if there is one."""
    return next(iter(checkpoints_in(run.folder)), None)


def _finish(comparison: Comparison, run: Run, tools: Tools, say: Say, bar: tqdm) -> dict[str, Scores]:
    """Do what is left to do of one run; its scores by metric."""
    say('training')
    start, epochs = bar.n, comparison.config(run.variant).train_cfg.get('max_epochs')

    def show(line: str) -> None:
        """Move the bar to where a line of the training's log says that it is."""
        done = _part_done(line, epochs)
        if done is not None:
            if bar.n == start:  # a resumed training has done that before
                bar.initial += done
            bar.n = start + done
            bar.set_postfix_str(''.join(f'loss {loss}' for loss in LOSS.findall(line)), refresh=False)
            bar.update(0)

    run_process(tools.command('train', comparison.config_file(run.variant), '--work-dir', run.folder, '--resume',
                              '--cfg-options', f'randomness.seed={run.seed}'), run.folder / 'output.log', show)
    checkpoint = checkpoint_of(run)
    if checkpoint is None:
        raise UserError(f'{run.folder}: the training left no checkpoint; delete the folder and start again')
    say('running the last checkpoint on the val set')
    evaluation = run.folder / 'evaluation'
    evaluation.mkdir(exist_ok=True)
    write_text(evaluation / 'config.py', _val_config(comparison, run).pretty_text)
    run_process(tools.command('test', evaluation / 'config.py', checkpoint, '--work-dir', evaluation),
                evaluation / 'output.log')
    scores, resampled = {}, {}
    for metric in comparison.metrics():
        detections = run.folder / f'detections.{metric}.json'
        try:
            scores[metric], matches = score_detections(comparison.annotations(), detections, metric, comparison.classes)
        except (ValueError, OSError) as error:
            raise UserError(f'the {metric} detections can\'t be scored: {error}') from error
        resampled[metric] = resampled_precision(matches).tolist()
    write_text(run.folder / 'resampled.json', json.dumps(resampled))
    write_text(run.folder / 'scores.json', json.dumps({m: asdict(s) for m, s in scores.items()}, indent=2))
    return scores


def _val_config(comparison: Comparison, run: Run) -> Config:
    """The variant's config, testing on the val set, with detections written instead of evaluated."""
    cfg = comparison.config(run.variant)
    cfg.test_dataloader = cfg.val_dataloader
    cfg.test_cfg = dict(cfg.get('val_cfg') or {}, type='TestLoop')
    cfg.test_evaluator = dict(coco_evaluator(cfg), type='mmdet.CocoMetric', format_only=True,
                              metric=comparison.metrics(), outfile_prefix=str(run.folder / 'detections'))
    return cfg


def _part_done(line: str, epochs: int | None) -> float | None:
    """The part of a training that a line of its log says is done, 0 to 1; None for other lines."""
    if epochs and (found := EPOCH.search(line)):
        epoch, step, steps = map(int, found.groups())
        return (epoch - 1 + step / steps) / epochs
    found = ITERATION.search(line)
    return found and int(found[1]) / int(found[2])


def run_process(command: list[str], log: Path, show: Callable[[str], object] = str) -> None:
    """Run this Python with some arguments until it ends; it ends with this process, too.

    Args:
        command: the arguments.
        log: what it prints is added to this file.
        show: gets each line of it.

    Raises:
        UserError: it failed; the message has the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=15)
    process = subprocess.Popen([sys.executable, '-u', *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               encoding='utf-8', errors='replace', preexec_fn=_end_with_parent)
    try:
        with log.open('a', encoding='utf-8') as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                tail.append(line.rstrip())
                show(line)
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()
    if process.returncode:
        raise UserError(f'{" ".join(command)} ended with status {process.returncode}; its last lines (all in {log}):\n'
                        + '\n'.join(tail))


def _end_with_parent() -> None:
    """Called in a new process: it gets SIGTERM when its parent is gone, by ``kill -9`` for instance (Linux only)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
