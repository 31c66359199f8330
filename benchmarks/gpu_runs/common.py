"""What the parts of benchmarks/gpu.py share: the clock, timing by the GPU's events, pages."""
import argparse
import datetime
import gc
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from command_line import processor
from zoo.reasons import short_reason

ROOT = Path(__file__).resolve().parents[2]
LEFT_OVER = 4.
"""Seconds at the end in which nothing is begun."""
FORKS = dict(mmdet='onedl-mmdetection', mmcv='onedl-mmcv', mmengine='onedl-mmengine')
"""Under which names the packages of OpenMMLab are published today."""
AGAIN = 5.
"""Seconds after which something is told once more that its time is over."""


class Clock:
    """How much of the given time is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic() - LEFT_OVER

    def without(self, seconds: float) -> 'Clock':
        """A clock that ends so much earlier."""
        return Clock(self.left() - seconds + LEFT_OVER)

    def part(self, share: float) -> 'Clock':
        """A clock for that share of what is left."""
        return Clock(share * self.left() + LEFT_OVER)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Raise TimeoutError in what is still running when the time is over, again and again if that is caught."""
        def stop(*_: Any) -> None:
            raise TimeoutError('it was stopped, its time was over')

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(0.01, self.left()), AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def why(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return 'out of memory'
    return f'{type(error).__name__}: {short_reason(error)}'[:200]


def clear(device: str) -> None:
    gc.collect()
    if device == 'cuda':
        torch.cuda.empty_cache()


def synchronise(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], device: str, count: int) -> tuple[list[float], float]:
    """What each of some runs in a row takes by the GPU's events, and how long the host is busy with one in the mean.

    Without a GPU both are the host's time.
    """
    synchronise(device)
    marks = [_mark(device)]
    begin = time.perf_counter()
    for _ in range(count):
        run()
        marks.append(_mark(device))
    host = 1e3 * (time.perf_counter() - begin) / count
    synchronise(device)
    pairs = list(zip(marks, marks[1:], strict=False))
    if device == 'cuda':
        return [before.elapsed_time(after) for before, after in pairs], host
    return [1e3 * (after - before) for before, after in pairs], host


def _mark(device: str) -> Any:
    if device == 'cpu':
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """On what and with what a page was made."""
    versions = {}
    for package, other in FORKS.items():
        for name in (other, package):
            try:
                versions[package] = version(name)
                break
            except PackageNotFoundError:
                continue
    device = torch.cuda.get_device_name() if args.device == 'cuda' else f'no GPU (a rehearsal on {processor()})'
    return dict(device=device, processor=processor(), cores=os.cpu_count(), torch=torch.__version__,
                cuda=torch.version.cuda, versions=versions, date=datetime.date.today().isoformat(),
                commands=[shlex.join(['python', *sys.argv])])


def heading(title: str, found: dict[str, Any]) -> list[str]:
    """The first lines of a page."""
    about = found['environment']
    versions = ''.join(f', {name} {number}' for name, number in about['versions'].items())
    commands = ' and '.join(f'`{command}`' for command in about['commands'])
    return [f'# {title}', '', f'Made by {commands} on {about["device"]}, {about["cores"]} cores of '
            f'{about["processor"]}, torch {about["torch"]}, CUDA {about["cuda"]}{versions}, {about["date"]}.', '']


def write(args: argparse.Namespace, name: str, found: dict[str, Any], page: list[str]) -> None:
    """NAME.json and NAME.md."""
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f'{name}.json').write_text(json.dumps(found, indent=1) + '\n')
    (args.out / f'{name}.md').write_text('\n'.join(page).rstrip() + '\n')


def cells(*values: Any) -> str:
    """A row of a table."""
    return '| ' + ' | '.join(str(value).replace('|', '\\|') for value in values) + ' |'


def head(*titles: str) -> list[str]:
    """The first two lines of a table."""
    return [cells(*titles), '|' + '---|' * len(titles)]
