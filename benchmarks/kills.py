"""Kill trainings at random moments, resume them, and count what became of them.

    python benchmarks/kills.py --kills 100

A training of a few seconds, with RandomFlip and shuffled data, that keeps one checkpoint. It is killed at a moment
drawn uniformly between its start and its end, by SIGKILL and SIGTERM in turn, resumed by `tools/train.py --resume`, and
so on, each training up to four times. Then it is resumed to its end, and its weights are compared with those of a
training that nobody has disturbed. All trainings are children of one process that has imported everything, so that the
moments lie in the training, not in its imports.
"""
import argparse
import contextlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from yapf.yapflib import yapf_api

import rl_mmdet  # noqa: F401
from command_line import Parser, positive

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
CONFIG = '''
_base_ = '{root}/configs/digits/atss_rl-r34-k2_fpn_digits.py'
model = dict(backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16, 32]))
small = dict(image_size=(64, 64), data_root='{folder}/digits/')
flip = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
        dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs')]
train_dataloader = dict(batch_size=2, dataset=dict(num_images=12, pipeline=flip, **small))
val_dataloader = dict(dataset=dict(num_images=2, **small))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='{folder}/digits/annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=4)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
del small, flip
'''
LAST = 'epoch_4.pth'


def start(config: Path, work: Path) -> int:
    """Start a training that resumes by itself, with its output in ``output.log``; the process's number."""
    work.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        return child
    status = 1
    with contextlib.suppress(BaseException), (work / 'output.log').open('a', buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.argv = ['train.py', str(config), '--work-dir', str(work), '--resume']
        try:
            runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='__main__')
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    os._exit(status)


def end_of(child: int, after: float | None = None, by: int = 0) -> int | None:
    """A training's exit status, None if it was killed ``after`` seconds."""
    begin = time.monotonic()
    while time.monotonic() - begin < (after or 600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, by or signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def weights(work: Path) -> dict[str, torch.Tensor]:
    return torch.load(work / LAST, weights_only=False)['state_dict']


def one_training(config: Path, work: Path, seconds: float, counts: Counter) -> None:
    """Kill one training up to four times, then let it end; what became of it is counted."""
    for _ in range(4):
        by = SIGNALS[counts['kills'] % 2]
        status = end_of(start(config, work), random.uniform(0, seconds), by)
        if status is not None:  # it was faster, or failed
            break
        counts['kills'] += 1
        counts[f'by {signal.Signals(by).name}'] += 1
        counts['something of the checkpoint was written'] += any(work.glob('*.part'))
    status = end_of(start(config, work))
    text = (work / 'output.log').read_text()
    begun = [int(each or 0) for each in re.findall(r'goes on .*after iteration (\d+)|so the training begins', text)]
    counts['trainings'] += 1
    counts['checkpoints passed over'] += len(re.findall(r'--resume: \S+\.pth:', text))
    if status != 0:
        counts['failed'] += 1
        print(text[-2000:])
    elif begun != sorted(begun):
        counts['went back'] += 1
    else:
        counts['ended by itself'] += 1
        counts['same weights'] += same(weights(work), weights(work.parent / 'whole'))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], value) for key, value in other.items())


def page(counts: Counter, args: argparse.Namespace) -> str:
    """The result page."""
    return '\n'.join([
        '# Killed trainings', '',
        'A training of a few seconds (ATSS, R-34, digit scenes, RandomFlip, shuffled data, one checkpoint kept) is '
        'killed at random moments, resumed by `--resume`, killed again, up to four times, and then let to its end. '
        '*Same weights*: bit for bit those of a training that nobody has disturbed. *Went back*: it began from an '
        'older checkpoint than it had begun from before.', '',
        '| | count |', '|---|---:|',
        *(f'| {name} | {counts[name]} |' for name in (
            'kills', 'by SIGKILL', 'by SIGTERM', 'something of the checkpoint was written', 'trainings',
            'checkpoints passed over', 'failed', 'went back', 'ended by itself', 'same weights')), '',
        f'Made by `python benchmarks/kills.py --kills {args.kills} --out docs/results/kills.md` on a CPU.', ''])


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--kills', type=positive, default=100)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--out', type=Path, metavar='FILE.md', help='write the result page')
    return parser.parse_args()


def main() -> None:
    args = parse()
    random.seed(args.seed)
    torch.set_num_threads(1)
    yapf_api.FormatCode = lambda text, **_: (text, True)  # MMEngine formats configs for longer than this training takes
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, 'config.py')
        config.write_text(CONFIG.format(root=ROOT, folder=folder))
        counts: Counter = Counter()
        for name in ('warm', 'whole'):  # the first one makes the data
            begin = time.monotonic()
            if end_of(start(config, Path(folder, name))):
                sys.exit(Path(folder, name, 'output.log').read_text()[-3000:])
        seconds = time.monotonic() - begin
        print(f'a training takes {seconds:.1f} s', flush=True)
        while counts['kills'] < args.kills:
            work = Path(folder, 'work')
            one_training(config, work, seconds, counts)
            shutil.rmtree(work)
            print(json.dumps(counts), flush=True)
    if args.out:
        args.out.write_text(page(counts, args))


if __name__ == '__main__':
    main()
