"""Part D: trainings that take too long on CPUs, by the scripts that are there for them."""
import argparse
import os
import signal
import subprocess
import sys
from contextlib import suppress

from .common import ROOT, Clock

REPORT_SECONDS = 30.
"""What the report on the finished trainings needs."""
STOP_SECONDS = 8.
"""What a comparison is given to stop its trainings."""
BCCD = ('--variants', 'skip', 'slim-coupled', 'rl-v1-coupled')
LONG = ('--epochs', '54', '--seeds', '1', '--variants', 'light-fit-fade', 'skip')
SHORT = ('--epochs', '1', '--seeds', '1', '--variants', 'skip')


def run_trainings(args: argparse.Namespace, clock: Clock) -> list[str]:
    """Each has an equal part of the time that is left; returns what to print at the end."""
    wanted = [train for data, train in ((args.cifar, _cifar), (args.bccd, _bccd), (args.aquarium, _aquarium)) if data]
    return [train(args, clock.part(1 / (len(wanted) - number))) for number, train in enumerate(wanted)]


def _cifar(args: argparse.Namespace, clock: Clock) -> str:
    size = ['--small'] if args.small else ['--models', 'resnet32', 'vit', '--epochs', '12']
    ended = _script('cifar.py', *size, '--device', args.device, '--data', args.cifar.resolve(), '--jobs', args.jobs,
                    '--minutes', clock.left() / 60, '--out', args.out.resolve() / 'cifar', seconds=clock.left())
    return f'D: CIFAR-10, {ended}'


def _bccd(args: argparse.Namespace, clock: Clock) -> str:
    return _comparison(args, clock, 'bccd', '--data', args.bccd.resolve(), *(SHORT if args.small else BCCD))


def _aquarium(args: argparse.Namespace, clock: Clock) -> str:
    return _comparison(args, clock, 'aquarium', '--data', args.aquarium.resolve(), '--weights', args.weights.resolve(),
                       *(SHORT if args.small else LONG))


def _comparison(args: argparse.Namespace, clock: Clock, name: str, *options: object) -> str:
    """By the script of that name; a further call goes on with its trainings."""
    options = (*options, '--jobs', args.jobs, '--work-dir', args.out.resolve() / f'{name}_runs',
               '--report-dir', args.out.resolve() / name)
    ended = _script(f'{name}.py', *options, seconds=clock.left() - REPORT_SECONDS)
    if ended != 'all of it':
        _script(f'{name}.py', *options, '--report-only', seconds=clock.left())
    return f'D: {name}, {ended}'


def _script(name: str, *arguments: object, seconds: float) -> str:
    """Run one of the scripts for so long at most; returns how far it came."""
    process = subprocess.Popen([sys.executable, str(ROOT / 'benchmarks' / name), *map(str, arguments)],
                               start_new_session=True)
    try:
        status = process.wait(max(1., seconds))
    except subprocess.TimeoutExpired:
        for how in (signal.SIGINT, signal.SIGKILL):
            os.killpg(process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
                break
        return 'as far as it came in time'
    return 'all of it' if status == 0 else f'it failed with status {status}'
