"""A training that is told to stop saves a checkpoint first."""
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch
from mmengine.dist import all_reduce, is_distributed, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from .hooks import WholeCheckpointHook


@contextmanager
def saved_when_stopped(runner: Runner) -> Iterator[None]:
    """Within the block, SIGTERM and Ctrl-C let the training end after its iteration, with a checkpoint.

    A process that it forks ends at a SIGTERM as if there were no handler, and leaves Ctrl-C to the training.

    Raises:
        KeyboardInterrupt: it has ended; the text says how to go on.
    """
    hook = _StopHook()
    runner.register_hook(hook, priority='LOWEST')
    before = {number: signal.signal(number, hook.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _StopHook(Hook):
    """Ends a training where it can be saved, if a signal has asked for it.

    Of several processes, of which not all may have been asked, each asks the others in every tenth iteration.

    Attributes:
        process: the id of the training's process.
        asked: whether this process is to stop.
        running: whether there is something to save.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.asked = self.running = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler. Before the first iteration, and at a second Ctrl-C, the training stops at once.

        Processes that the training forks inherit it: SIGTERM ends them, as an evaluator's pool does, and Ctrl-C is left
        to the training.
        """
        if os.getpid() != self.process:
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if not self.running or self.asked and number == signal.SIGINT and not is_distributed():
            raise KeyboardInterrupt
        if is_main_process() and not self.asked:
            os.write(2, b'stopping within ten iterations\n' if is_distributed() else
                     b'stopping after this iteration; Ctrl-C again stops at once, without a checkpoint\n')
        self.asked = True

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        self.running = True

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        if not (is_distributed() and (runner.iter + 1) % 10) and self._agreed():
            self._stop(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                       outputs: list | None = None) -> None:
        if self.running and not is_distributed() and self.asked:
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # puts the weights that learn back
            self._stop(runner, runner.iter)

    def after_val(self, runner: Runner) -> None:
        if self.running and self._agreed():
            self._stop(runner, runner.iter)

    def after_train(self, runner: Runner) -> None:
        self.running = False

    def _agreed(self) -> bool:
        """Whether a process is to stop, which all learn in the same iteration."""
        if is_distributed():
            asked = torch.tensor(int(self.asked))
            all_reduce(asked, op='max')
            self.asked = bool(asked)
        return self.asked

    def _stop(self, runner: Runner, iteration: int) -> NoReturn:
        self.running = False
        for hook in runner.hooks:
            if isinstance(hook, WholeCheckpointHook):
                path = hook.save_interrupted(runner, runner.epoch, iteration)
                raise KeyboardInterrupt(f'after iteration {iteration}, which is saved in {path}; go on with --resume')
        raise KeyboardInterrupt(f'after iteration {iteration}; nothing was saved, as there is no CheckpointHook')
