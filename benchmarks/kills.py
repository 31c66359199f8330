"""Kill trainings at random moments, resume them, and count what became of them.

    python benchmarks/kills.py --kills 200

Trainings of a few seconds, with RandomFlip and shuffled data, that keep one checkpoint: one with replaced blocks, one
that searches for a plan in its first half, one whose transfer is searched there. Each is killed at a moment drawn
uniformly between its start and its end, by SIGKILL and SIGTERM in turn, the next one by SIGKILL while it writes the
first checkpoint after such a moment, and so on; resumed by `tools/train.py --resume`, up to four times. Then it is
resumed to its end, and its weights are compared with those of a training that nobody has disturbed. All trainings are
children of one process that has imported everything, so that the moments lie in the training, not in its imports.
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
MANNERS = ((signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, False), (signal.SIGKILL, True))
"""By which signal a training is killed, and whether while it writes a checkpoint; they take turns."""
BASE = '''
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
KINDS = {
    'replaced': '',
    'search': "model = dict(backbone=dict(replacement=dict(plan=dict(_delete_=True, type='LearnedPlan', "
              "budget=dict(params=0.8), epochs=2))))",
    'transfer': "model = dict(backbone=dict(norm_eval=True, replacement=None, transfer=dict(type='SWR', budget=0.2, "
                "epochs=2)))",
}
"""What is trained: lines at the end of the config."""
LAST = 'epoch_4.pth'
UNFINISHED = '*.pth.part'


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


def end_of(child: int, after: float | None = None, by: int = signal.SIGKILL, writing: Path | None = None) -> int | None:
    """A training's exit status, None if it was killed after some seconds, or then as soon as it writes a checkpoint.

    Args:
        child: the process.
        after: seconds; None to let it end.
        by: the signal.
        writing: its work dir, to wait for a checkpoint that is being written.
    """
    begin = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        taken = time.monotonic() - begin
        if taken > (600 if after is None else after) and (writing is None or any(writing.glob(UNFINISHED))):
            break
        time.sleep(0.005 if writing is None else 0.0002)
    os.kill(child, by)
    os.waitpid(child, 0)
    return None


def weights(work: Path) -> dict[str, torch.Tensor]:
    return torch.load(work / LAST, weights_only=False)['state_dict']


def one_training(config: Path, work: Path, seconds: float, counts: Counter) -> None:
    """Kill one training up to four times, then let it end; what became of it is counted."""
    for _ in range(4):
        by, writing = MANNERS[counts['kills'] % len(MANNERS)]
        status = end_of(start(config, work), random.uniform(0, seconds), by, work if writing else None)
        if status is not None:  # it was faster, or failed
            break
        counts['kills'] += 1
        counts[f'by {signal.Signals(by).name}'] += 1
        counts['while a checkpoint was written'] += any(work.glob(UNFINISHED))
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


def page(counts: dict[str, Counter], args: argparse.Namespace) -> str:
    """The result page."""
    names = ('kills', 'by SIGKILL', 'by SIGTERM', 'while a checkpoint was written', 'trainings',
             'checkpoints passed over', 'failed', 'went back', 'ended by itself', 'same weights')
    return '\n'.join([
        '# Killed trainings', '',
        'Trainings of a few seconds (ATSS, R-34, digit scenes, RandomFlip, shuffled data, one checkpoint kept) are '
        'killed at random moments, half of them while they write the first checkpoint after such a moment, resumed by '
        '`--resume`, killed again, up to four times, and then let to their end. *Replaced* has every second block '
        'replaced, *search* a `LearnedPlan` and *transfer* an `SWR`, both of which search in the first half. *Same '
        'weights*: bit for bit those of a training that nobody has disturbed. *Went back*: it began from an older '
        'checkpoint than it had begun from before.', '',
        f'| | {" | ".join(counts)} |', '|---|' + '---:|' * len(counts),
        *(f'| {name} | {" | ".join(str(each[name]) for each in counts.values())} |' for name in names), '',
        f'Made by `python benchmarks/kills.py --kills {args.kills} --out docs/results/kills.md` on a CPU.', ''])


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--kills', type=positive, default=200)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--out', type=Path, metavar='FILE.md', help='write the result page')
    return parser.parse_args()


def main() -> None:
    args = parse()
    random.seed(args.seed)
    torch.set_num_threads(1)
    yapf_api.FormatCode = lambda text, **_: (text, True)  # MMEngine formats configs for longer than this training takes
    counts = {kind: Counter() for kind in KINDS}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            kill_trainings(kind, Path(folder), -(-args.kills // len(KINDS)), counts[kind])
    if args.out:
        args.out.write_text(page(counts, args))


def kill_trainings(kind: str, folder: Path, kills: int, counts: Counter) -> None:
    """Kill trainings of one kind so many times, and count what becomes of them."""
    base, config, work = folder / 'base.py', folder / 'config.py', folder / 'work'
    base.write_text(BASE.format(root=ROOT, folder=folder))
    config.write_text(f"_base_ = 'base.py'\n{KINDS[kind]}\n")
    for name in ('warm', 'whole'):  # the first one makes the data
        begin = time.monotonic()
        if end_of(start(config, folder / name)):
            sys.exit((folder / name / 'output.log').read_text()[-3000:])
    seconds = time.monotonic() - begin
    print(f'{kind}: a training takes {seconds:.1f} s', flush=True)
    while counts['kills'] < kills:
        one_training(config, work, seconds, counts)
        shutil.rmtree(work)
        print(json.dumps(counts), flush=True)


if __name__ == '__main__':
    main()
