"""Processes that a training forks, such as those of an evaluator's pool, end when they are told to."""
import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event

from rl_mmdet.engine import saved_when_stopped


class Runner:
    """As much of a runner as is needed: its hooks."""

    def register_hook(self, hook, priority):
        self.hook = hook


def work(started: Event) -> None:
    """What a forked process does."""
    started.set()
    time.sleep(2)


def test_a_forked_process_ends_at_sigterm_and_leaves_ctrl_c_to_the_training():
    runner, fork, exits = Runner(), multiprocessing.get_context('fork'), {}
    with saved_when_stopped(runner):
        runner.hook.running = True
        for number in (signal.SIGTERM, signal.SIGINT):
            started = fork.Event()
            process = fork.Process(target=work, args=(started,))
            process.start()
            assert started.wait(20)  # Python forgets signals that come while it forks
            os.kill(process.pid, number)
            process.join(20)
            exits[number] = process.exitcode
    assert exits == {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 0}
    assert not runner.hook.asked
