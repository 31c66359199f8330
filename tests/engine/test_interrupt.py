"""Processes that a training forks, such as those of an evaluator's pool, end when they are told to."""
import multiprocessing
import os
import signal
import time

from rl_mmdet.engine import saved_when_stopped


class Runner:
    """As much of a runner as is needed: its hooks."""

    def register_hook(self, hook, priority):
        self.hook = hook


def test_a_forked_process_ends_at_sigterm_and_leaves_ctrl_c_to_the_training():
    runner = Runner()
    with saved_when_stopped(runner):
        runner.hook.running = True
        processes = [multiprocessing.get_context('fork').Process(target=time.sleep, args=(2,)) for _ in range(2)]
        for process, number in zip(processes, (signal.SIGTERM, signal.SIGINT), strict=True):
            process.start()
            os.kill(process.pid, number)
        for process in processes:
            process.join(10)
    assert [process.exitcode for process in processes] == [-signal.SIGTERM, 0]
    assert not runner.hook.asked
