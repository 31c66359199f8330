"""Processes that check models: they survive what a model does to them."""
import multiprocessing
import os
import queue
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from mmengine.logging import MMLogger

from .check import FAILS, RUNS, Result, check_steps
from .configs import ROOT

SPAWN = multiprocessing.get_context('spawn')


class Worker:
    """One process that checks one model after the other, and is started anew when it dies or is too slow."""

    def __init__(self) -> None:
        self._process, self._pipe = None, None

    def check(self, name: str, limit: float, quick: bool = False) -> Result:
        """Check a config's model; ``limit`` is the most seconds that baseline and replaced model may take together."""
        if self._process is None:
            self._start()
        result = Result(name, FAILS)
        deadline = time.monotonic() + limit
        try:
            self._pipe.send((name, quick))
            while self._pipe.poll(max(0., deadline - time.monotonic())):
                news = self._pipe.recv()
                if news is None:
                    return result
                result = news
            reason = f'took longer than {limit:g} s'
        except (EOFError, OSError):
            self._process.join()
            reason = f'its process died (exit status {self._process.exitcode}; -9 is what a lack of memory looks like)'
        self.stop()
        return replace(result, rl=FAILS, reason=reason) if result.baseline == RUNS else replace(result, reason=reason)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        self._pipe, other = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._pipe.recv()


def check_in_parallel(names: Iterable[str], workers: int, limit: float, stop_after: float,
                      quick: bool) -> Iterator[Result]:
    """Check configs in ``workers`` processes; yields results as they come, and begins none after ``stop_after`` s."""
    deadline = time.monotonic() + stop_after
    crew = [Worker() for _ in range(workers)]
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in crew:
        idle.put(worker)

    def check(name: str) -> Result | None:
        worker = idle.get()
        try:
            return worker.check(name, limit, quick) if time.monotonic() < deadline else None
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([threads.submit(check, name) for name in names]):
            if future.result() is not None:
                yield future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in crew:
            worker.stop()


def _serve(pipe: Connection) -> None:
    """The process's work: a name (and whether to be quick) comes in, results go out, None when there are no more."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    MMLogger.get_current_instance().setLevel('ERROR')
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # some models print
        os.dup2(nowhere, stream)
    with suppress(OSError):  # where memory runs out, the kernel ends this process and not another
        Path('/proc/self/oom_score_adj').write_text('1000')
    os.chdir(ROOT.parent)  # configs name each other from there
    with suppress(EOFError):
        pipe.send(None)
        while True:
            for result in check_steps(*pipe.recv()):
                pipe.send(result)
            pipe.send(None)
