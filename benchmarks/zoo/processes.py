"""Every model is checked in a process of its own, which may hang, die or run out of memory."""
import multiprocessing
import os
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

FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['rl_mmdet', 'mmdet.models', 'mmdet.testing'])  # imported once, not once per model


def check_in_process(name: str, limit: float, quick: bool = False) -> Result:
    """Check a config's model; ``limit`` is the most seconds that baseline and replaced model may take together."""
    news, pipe = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_work, args=(pipe, name, quick), daemon=True)
    process.start()
    pipe.close()
    result = Result(name, FAILS)
    deadline = time.monotonic() + limit
    try:
        while news.poll(max(0., deadline - time.monotonic())):
            result = news.recv()
        reason = f'took longer than {limit:g} s'
    except EOFError:
        process.join()
        if process.exitcode == 0:
            return result
        reason = f'its process died (exit status {process.exitcode}; -9 is what a lack of memory looks like)'
    finally:
        process.kill()
        process.join()
    return replace(result, rl=FAILS, reason=reason) if result.baseline == RUNS else replace(result, reason=reason)


def check_in_parallel(names: Iterable[str], workers: int, limit: float, stop_after: float,
                      quick: bool) -> Iterator[Result]:
    """Check ``workers`` configs at a time; yields results as they come, and begins none after ``stop_after`` s."""
    deadline = time.monotonic() + stop_after

    def check(name: str) -> Result | None:
        return check_in_process(name, limit, quick) if time.monotonic() < deadline else None

    threads = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([threads.submit(check, name) for name in names]):
            if future.result() is not None:
                yield future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _work(pipe: Connection, name: str, quick: bool) -> None:
    """What the process does: results go into the pipe."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    MMLogger.get_current_instance().setLevel('ERROR')
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # some models print
        os.dup2(nowhere, stream)
    with suppress(OSError):  # where memory runs out, the kernel ends this process and not another
        Path('/proc/self/oom_score_adj').write_text('1000')
    os.chdir(ROOT.parent)  # configs name each other from there
    for result in check_steps(name, quick):
        pipe.send(result)
