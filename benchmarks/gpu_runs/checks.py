"""Part A: the tests marked gpu, as far as they come in time."""
import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .common import ROOT, Clock, cells, environment, head, heading, write

COLLECTED = re.compile(r'\[(\d+) items\]|/ (\d+) selected|collected (\d+) items')
"""How pytest says the number of tests: spread over processes, some of them, all of them."""


def run_checks(args: argparse.Namespace, clock: Clock) -> list[str]:
    """Returns what to print at the end."""
    args.out.mkdir(parents=True, exist_ok=True)
    results, log = (args.out / f'gpu_checks.{kind}' for kind in ('jsonl', 'log'))
    results.write_text('')
    begin = time.monotonic()
    ended = _pytest(args, min(clock.left(), 60 * args.checks_minutes), results, log)
    text = log.read_text()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    found = dict(environment=environment(args), seconds=time.monotonic() - begin, ended=ended,
                 collected=_collected(text), rows=sorted(rows, key=lambda row: row['name']), tail=text[-4000:])
    write(args, 'gpu_checks', found, _page(found))
    for file in (results, log):
        file.unlink()
    failed = [f'  {row["name"]}: {row["reason"]}' for row in found['rows'] if row['result'] == 'failed']
    return [f'A: {_summary(found)}', *failed, *([] if rows else text.splitlines()[-15:])]


def _pytest(args: argparse.Namespace, seconds: float, results: Path, log: Path) -> bool:
    """Run it; returns whether it came to its end."""
    spread = args.jobs > 1 and importlib.util.find_spec('xdist')
    command = [sys.executable, '-m', 'pytest', '-v', '-m', 'gpu', '--tb=short', '-p', 'no:cacheprovider',
               '-p', 'gpu_runs.pytest_results', *(['-n', str(args.jobs), '--dist', 'worksteal'] if spread else []),
               *args.tests, *shlex.split(args.pytest)]
    paths = [str(ROOT / 'benchmarks'), str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    more = dict(PYTHONPATH=os.pathsep.join(paths), GPU_CHECKS_RESULTS=str(results.resolve()))
    outer = {key: value for key, value in os.environ.items() if not key.startswith('PYTEST_')}
    if args.device == 'cpu':
        more['RL_MMDET_TEST_DEVICE'] = 'cpu'
    with log.open('w') as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=outer | more,
                                   start_new_session=True)
        try:
            process.wait(max(1., seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
    return True


def _collected(text: str) -> int | None:
    """How many tests there were to run."""
    numbers = [int(next(filter(None, groups))) for groups in COLLECTED.findall(text)]
    return numbers[-1] if numbers else None


def _summary(found: dict[str, Any]) -> str:
    counts = Counter(row['result'] for row in found['rows'])
    said = ', '.join(f'{count} {result}' for result, count in sorted(counts.items())) or 'no test ended'
    of = '' if found['collected'] is None else f' of {found["collected"]}'
    stopped = '' if found['ended'] else '; then the time was over and pytest was stopped'
    return f'{said}{of} in {found["seconds"]:.0f} s{stopped}.'


def _page(found: dict[str, Any]) -> list[str]:
    page = [*heading('Checks on a GPU', found), _summary(found), '']
    for title, wanted in (('Not passed', False), ('Passed', True)):
        rows = [row for row in found['rows'] if (row['result'] == 'passed') == wanted]
        if rows:
            page += [f'## {title}', '', *head('test', 'result', 'seconds', 'reason')]
            page += [cells(f'`{row["name"]}`', row['result'], row['seconds'], row['reason'][:300]) for row in rows]
            page.append('')
    if not found['rows']:
        page += ['pytest\'s last lines:', '', '```', *found['tail'].splitlines()[-30:], '```']
    return page
