"""One training as a process of its own: resumable, with its progress shown and its cost kept."""
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine import UserError
from ..engine.files import write_text

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None
PROGRESS = re.compile(r'(Epoch\((train|val|test)\).*|Iter\(\w+\).*|.*bbox_mAP_copypaste.*|error: .*|interrupted)')


@dataclass
class TrainingCost:
    """What a training has cost so far, with all that was interrupted.

    Args:
        seconds: wall time of the processes, start-up and evaluation included.
        peak_rss: largest resident set of one process, in bytes.
        finished: whether the training came to its end.
    """
    seconds: float = 0.
    peak_rss: int = 0
    finished: bool = False


def run_training(command: list[str], work_dir: Path, say: Callable[[str], None]) -> TrainingCost:
    """Run ``command`` to its end, unless an earlier call has done so.

    Args:
        command: arguments for this Python, a tools/train.py call that resumes by itself.
        work_dir: where it writes; ``cost.json`` and ``output.log`` are added.
        say: gets one line whenever there is progress.

    Raises:
        UserError: the training failed; the message has the end of its output.
        KeyboardInterrupt: passed on after the process has ended and its cost is kept.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    record = work_dir / 'cost.json'
    cost = TrainingCost(**json.loads(record.read_text())) if record.is_file() else TrainingCost()
    if cost.finished:
        return cost
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, '-u', *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, preexec_fn=end_with_parent)
    try:
        with _signal_handler(signal.SIGTERM, signal.default_int_handler):  # leave no training running alone
            tail = _follow(process, work_dir / 'output.log', say)
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        with _signal_handler(signal.SIGINT, signal.SIG_IGN):  # a second Ctrl-C must not lose the record
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            cost.seconds += time.monotonic() - start
            cost.peak_rss = max(cost.peak_rss, usage.ru_maxrss * 1024)
            cost.finished = process.returncode == 0
            write_text(record, json.dumps(asdict(cost)))
    if not cost.finished:
        raise UserError(f'{" ".join(command)} ended with status {process.returncode}; its last lines '
                        f'(all in {work_dir / "output.log"}):\n' + '\n'.join(tail))
    return cost


def end_with_parent() -> None:
    """Called in a new process: it gets SIGTERM when its parent is gone, by ``kill -9`` for instance (Linux only)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _follow(process: subprocess.Popen, log: Path, say: Callable[[str], None]) -> deque[str]:
    """Copy the output to the log until it ends; its last lines."""
    tail: deque[str] = deque(maxlen=15)
    with log.open('a') as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            tail.append(line.rstrip())
            found = PROGRESS.search(line)
            if found:
                say(' '.join(found[0].split()))
    return tail


@contextlib.contextmanager
def _signal_handler(number: int, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
