"""The paper's own ground, small: ResNets and a ViT on CIFAR-10, with and without replaced blocks.

Every training starts from nothing; what counts is the accuracy after the last epoch. Writes OUT.md and OUT.json after
every training. Needs torch, torchvision, scipy and rl_mmdet.replacement; MMDetection needn't be installed.

    python benchmarks/cifar.py --device cuda --jobs 8 --minutes 5
    python benchmarks/cifar.py --device cuda --jobs 8 --minutes 5 --models resnet110 --seeds 2 --resume
    python benchmarks/cifar.py --device cpu --models resnet20 --width 8 --k 2 --batch 128 --jobs 2 --out OUT
    python benchmarks/cifar.py --small --device cpu

Every k-th block of a stage is replaced, or of the whole ViT; k is 4, as in the paper, unless said otherwise. Arms:

    baseline        nothing replaced
    rl-v1           RL-v1, detached, learning in one of eight steps
    rl-v1-coupled   RL-v1, the neighbours learn from the replaced block, too
    rl-v1-attention the same, but the MLPs keep their weights, as in the paper; for the ViT
    rl-v2           a light operator: SlimBlock, learning in one of eight steps
    rl-v2-every-1   the same, learning in every step
    rl-v2-coupled   the same, the neighbours learn from it, too
    rl-v2-transform a full block with a learned transformation of its weights, coupled
    skip            the blocks left out
    shared          the weights of the kept block before, which learns from both places
    shorter         nothing replaced, and as many steps as cost what skip costs
    narrower        nothing replaced, and narrower stages that cost about what rl-v2-coupled costs
"""
import argparse
import gc
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cifar_runs.images import Data, read
from cifar_runs.networks import ARMS, NETWORKS, ONLY_FOR
from cifar_runs.page import page
from cifar_runs.training import Recipe, Run, train
from command_line import Parser, above_zero, positive

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = dict(epochs=20, seeds=3, batch=512, width=16, train_images=None, test_images=None,
                out=ROOT / 'docs/results/cifar')
SMALL = dict(epochs=2, seeds=1, batch=64, width=4, train_images=256, test_images=200,
             out=ROOT / 'work_dirs/cifar_small')


def attempt(run: Run, recipe: Recipe, data: Data, deadline: float) -> dict[str, Any]:
    """The row of a training, which may have failed."""
    gc.collect()
    try:
        return train(run, recipe, data, deadline)
    except Exception as error:  # the others go on
        return failed(run, error)


def failed(run: Run, error: BaseException) -> dict[str, Any]:
    lines = str(error).strip().splitlines()
    return dict(asdict(run), error=f'{type(error).__name__}: {lines[0] if lines else "no message"}')


def attempt_here(run: Run, recipe: Recipe, file: str, deadline: float) -> dict[str, Any]:
    """What a process of :func:`all_rows` does."""
    torch.set_num_threads(1)
    return attempt(run, recipe, torch.load(file, mmap=True, weights_only=True), deadline)


def attempt_in_process(*args: Any) -> dict[str, Any]:
    """Every training has a process of its own: one that dies, or spoils its GPU context, is one row."""
    run, *_, deadline = args
    if time.time() > deadline:
        return failed(run, TimeoutError('not begun: out of time'))
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
            return pool.submit(attempt_here, *args).result()
    except Exception as error:  # BrokenProcessPool, or one from the start of the process
        return failed(run, error)


def all_rows(runs: list[Run], recipe: Recipe, data: Data, jobs: int, deadline: float) -> Iterator[dict[str, Any]]:
    """Carry out the trainings in their order, ``jobs`` at a time, and give their rows as they come."""
    if jobs == 1:
        yield from (attempt(run, recipe, data, deadline) for run in runs)
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as threads:
        file = f'{folder}/data.pt'
        torch.save(data, file)
        futures = [threads.submit(attempt_in_process, run, recipe, file, deadline) for run in runs]
        yield from (future.result() for future in as_completed(futures))


def describe(row: dict[str, Any]) -> str:
    name = f'{row["network"]}, {row["arm"]}, seed {row["seed"]}'
    if 'error' in row:
        return f'{name}: {row["error"]}'
    return f'{name}: {row["accuracy"]:.2%}, loss {row["loss"]:.3f}, {sum(row["seconds"]):.0f} s'


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--data', type=Path, default=ROOT.parent / 'shared/data/cifar10_q75.npz', help='npz with the '
                        'images as JPEG files (default: ../shared/data/cifar10_q75.npz beside the repository)')
    parser.add_argument('--models', nargs='+', choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument('--arms', nargs='+', choices=ARMS, default=list(ARMS))
    parser.add_argument('--seeds', type=positive, help='how many: 0, 1, 2 ... (default: 3)')
    parser.add_argument('--epochs', type=positive, help='of every training (default: 20)')
    parser.add_argument('--batch', type=positive, help='images of a step; the learning rate follows (default: 512)')
    parser.add_argument('--width', type=positive, help='channels of the ResNets\' first stage; tokens of the ViT have '
                        '12 times as many (default: 16)')
    parser.add_argument('--k', type=positive, default=Recipe.k, help='every k-th block is replaced (default: '
                        '%(default)s)')
    parser.add_argument('--pair-rate', type=above_zero, default=Recipe.pair_rate, help='with SGD, the rate of '
                        'the pairs (a, b) over that of the weights (default: %(default)s)')
    parser.add_argument('--train-images', type=positive, metavar='N', help='only the first N')
    parser.add_argument('--test-images', type=positive, metavar='N', help='only the first N')
    parser.add_argument('--minutes', type=above_zero, default=float('inf'), help='when to end; what isn\'t finished by '
                        'then is named on the page')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--jobs', type=positive, default=1, help='trainings side by side, in processes; their times '
                        'are then not on the page (default: 1)')
    parser.add_argument('--small', action='store_true', help='a rehearsal in a minute: narrow networks, 256 images, 2 '
                        'epochs, one seed, where no other option says otherwise')
    parser.add_argument('--resume', action='store_true', help='go on with what OUT.json has of the same settings')
    parser.add_argument('--out', type=Path, help='the page and its data, without suffix (default: docs/results/cifar, '
                        'with --small work_dirs/cifar_small)')
    args = parser.parse_args()
    if all(ONLY_FOR.get(arm, network) != network for arm in args.arms for network in args.models):
        parser.error(f'--arms {" ".join(args.arms)} fits none of --models {" ".join(args.models)}; allowed: '
                     + ', '.join(f'{arm} with {network}' for arm, network in ONLY_FOR.items()))
    for name, value in (SMALL if args.small else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU here; allowed: cpu')
    try:
        args.images = read(args.data, args.train_images, args.test_images)
    except ValueError as error:
        parser.error(str(error))
    return args


def start(args: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """The results to add to; of those that are there the finished trainings, if the settings are the same."""
    counts = {f'{split}_images': len(args.images[f'{split}_labels']) for split in ('train', 'test')}
    device = torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'
    results = dict(torch=torch.__version__, device=device, settings=dict(asdict(recipe), jobs=args.jobs, **counts),
                   commands=[shlex.join(['python', *sys.argv])], rows=[])
    file = args.out.with_suffix('.json')
    if args.resume and file.exists():
        old = json.loads(file.read_text())
        if any(old[key] != results[key] for key in ('torch', 'device', 'settings')):
            raise SystemExit(f'error: --resume: {file} is of other settings or of another machine: '
                             f'{old["settings"]}; give these, or another --out')
        results['rows'] = [row for row in old['rows'] if 'error' not in row]
        results['commands'] = list(dict.fromkeys([*old['commands'], *results['commands']]))
    return results


def main() -> None:
    begin = time.time()
    args = parse()
    recipe = Recipe(args.device, args.epochs, args.batch, args.width, args.k, args.pair_rate)
    results = start(args, recipe)
    done = {(row['network'], row['arm'], row['seed']) for row in results['rows']}
    wanted = [(network, arm, seed) for network, seed, arm in product(
        [name for name in NETWORKS if name in args.models], range(args.seeds),
        [name for name in ARMS if name in args.arms]) if ONLY_FOR.get(arm, network) == network]
    runs = [Run(*each) for each in wanted if each not in done]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for row in all_rows(runs, recipe, args.images, args.jobs, begin + 60 * args.minutes):
        results['rows'].append(row)
        print(f'{time.time() - begin:5.0f} s  {describe(row)}', flush=True)
        args.out.with_suffix('.json').write_text(json.dumps(results, indent=1) + '\n')
        args.out.with_suffix('.md').write_text(page(results))
    print(args.out.with_suffix('.md'))


if __name__ == '__main__':
    main()
