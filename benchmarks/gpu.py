"""What has to be seen on a GPU, in a few minutes: correct, time and memory of a training step, where the time goes.

    python benchmarks/gpu.py --part A B C --out docs/results --minutes 5.5
    python benchmarks/gpu.py --part A B C --out /tmp/rehearsal --device cpu --small --minutes 5

A   the tests marked gpu, by pytest                                             -> OUT/gpu_checks.md and .json
B   step time, peak memory and kernels of detectors with every way of replacing -> OUT/gpu_train_step.md and .json
C   which kernels and calls a step consists of                                  -> OUT/gpu_profile.md and .json
D   trainings: CIFAR-10, a detector on BCCD from scratch, one on Aquarium from ImageNet weights
                                                     -> OUT/cifar.md, OUT/bccd/report.md, OUT/aquarium/report.md

    python benchmarks/gpu.py --part D --out docs/results --minutes 9 --cifar cifar10_q75.npz --bccd DIR \
        --aquarium DIR --weights mobilenet-v2_imagenet.pth --jobs 4

Trainings side by side on one card share it only under NVIDIA's MPS (nvidia-cuda-mps-control -d, before the call);
without it they take turns. --resume goes on with what OUT has of part B; detectors of part D always do.

The most important rows come first; results are written after every one. Nothing is begun that can't end in time, and
what takes longer than expected is stopped.
"""
import argparse
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from command_line import Parser, above_zero, positive
from gpu_runs.checks import run_checks
from gpu_runs.common import Clock, why
from gpu_runs.profiles import run_profile
from gpu_runs.steps import run_steps
from gpu_runs.trainings import run_trainings
from gpu_runs.variants import cases_of

PARTS: dict[str, Callable[[argparse.Namespace, Clock], list[str]]] = {
    'A': run_checks, 'B': run_steps, 'C': lambda args, clock: run_profile(args, clock, cases_of(args.small)[0]),
    'D': run_trainings}
LEAST = 5.
"""Seconds without which no part is begun."""


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--part', nargs='+', choices=PARTS, required=True)
    parser.add_argument('--out', type=Path, required=True, help='folder of the results')
    parser.add_argument('--minutes', type=above_zero, default=5.5, help='in which all parts end (default: 5.5)')
    parser.add_argument('--checks-minutes', type=above_zero, default=2., help='most of these for part A (default: 2)')
    parser.add_argument('--profile-minutes', type=above_zero, default=1., help='what part B leaves for part C if that '
                        'comes later (default: 1)')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--small', action='store_true', help='tiny images and few cases: a rehearsal')
    parser.add_argument('--rounds', type=positive, default=5, help='at most (default: 5)')
    parser.add_argument('--cases', type=positive, help='only the first ones of part B')
    parser.add_argument('--resume', action='store_true', help='part B goes on with what OUT has: only cases that '
                        'aren\'t there, or not complete, are measured')
    parser.add_argument('--least-seconds', type=above_zero, default=20., help='part B begins no case with less than '
                        'this left (default: 20)')
    parser.add_argument('--jobs', type=positive, default=1, help='processes for part A, if pytest-xdist is there, and '
                        'trainings side by side in part D')
    for name, what in (('cifar', 'images as benchmarks/cifar.py takes them'),
                       ('bccd', 'folder as benchmarks/bccd.py takes it'),
                       ('aquarium', 'folder as benchmarks/aquarium.py takes it'), ('weights', 'its ImageNet weights')):
        parser.add_argument(f'--{name}', type=Path, help=f'for part D: {what}')
    parser.add_argument('--tests', nargs='+', default=['tests/gpu'], help='files for part A (default: tests/gpu)')
    parser.add_argument('--pytest', default='', help='more arguments for part A, as one text')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU here; allowed: cpu, for a rehearsal with --small')
    if (args.aquarium is None) != (args.weights is None):
        parser.error('--aquarium and --weights: part D needs both, or neither')
    if 'D' in args.part and not (args.cifar or args.bccd or args.aquarium):
        parser.error('--part D: nothing to train on; give --cifar FILE, --bccd DIR, or --aquarium DIR and --weights '
                     'FILE')
    args.part = list(dict.fromkeys(args.part))
    return args


def main() -> None:
    args = parse()
    os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # else the profiler complains about a GPU that isn't there
    clock, last = Clock(60 * args.minutes), []
    watchdog = threading.Timer(60 * args.minutes, give_up, [last])
    watchdog.daemon = True
    watchdog.start()
    for number, part in enumerate(args.part):
        kept = 60 * args.profile_minutes if part == 'B' and 'C' in args.part[number:] else 0.
        if clock.left() - kept < LEAST:
            last.append(f'{part}: no time')
            continue
        try:
            last += PARTS[part](args, clock.without(kept))
        except Exception as error:  # the other parts are worth their time
            last.append(f'{part}: {why(error)}')
    watchdog.cancel()
    print('\n' + '\n'.join(last))


def give_up(last: list[str]) -> None:
    """End the process, whatever it hangs in: all that was measured is written already."""
    print('\n' + '\n'.join([*last, 'the time was over, and something did not let itself be stopped']), flush=True)
    os._exit(1)


if __name__ == '__main__':
    main()
