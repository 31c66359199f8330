"""What each operator does to AP: a detector from scratch on digit scenes, the same plan for all, several seeds.

Baseline, the same blocks removed ("skip"), RL-v1 and the light operators are trained with the config's own schedule.
Finished trainings in --work-dir are reused, unfinished ones resumed. Writes docs/results/digits_operators.md, or
--out, with everything that is found in --work-dir.

    python benchmarks/digits_operators.py --seeds 0 1 2
"""
import argparse
import json
import re
import shlex
import statistics
from pathlib import Path

import torch

import rl_mmdet  # noqa: F401
from rl_mmdet.analysis import run_training

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'docs/results/digits_operators.md'
BASELINE = ROOT / 'configs/digits/faster-rcnn_r34_fpn_digits.py'
REPLACED = ROOT / 'configs/digits/faster-rcnn_rl-r34-k2_fpn_digits.py'
VARIANTS = {
    'baseline': None,
    'skip': dict(operator=dict(type='Skip')),
    **{f'{operator}, scale {scale}': dict(operator=dict(type=operator, scale=scale))
       for scale in (0, 0.1, 1) for operator in ('SlimBlock', 'DepthwiseBlock')},
    'RL-v1 (FullBlock, ScalarFusion)': {},
    'RL-v1, sample 0.125': dict(gradient=dict(sample=0.125, memory='rebuild')),
    'PooledBlock': dict(operator=dict(type='PooledBlock')),
    'FullBlock, ChannelFusion': dict(fusion=dict(type='ChannelFusion')),
    'FullBlock, TransformFusion': dict(fusion=dict(type='TransformFusion')),
}


PLANS = {
    'EveryKth(k=2)': dict(type='EveryKth', k=2),
    'Fraction(1)': dict(type='Fraction', p=1.0),
}
COUNTS = {'EveryKth(k=2)': 5, 'Fraction(1)': 8}


def folder_of(name: str, plan: str, seed: int, work_dir: Path) -> Path:
    words = f'{name}_{plan}' if plan == 'Fraction(1)' and name != 'baseline' else name
    return work_dir / f'{re.sub("[(),=]", "", words).lower().replace(" ", "-")}_{seed}'


def train(name: str, plan: str, seed: int, work_dir: Path) -> float:
    """Train a variant once, or find it trained: AP at the end."""
    folder = folder_of(name, plan, seed, work_dir)
    result = folder / 'ap.json'
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / 'config_of_variant.py'
        text = f'_base_ = {str(BASELINE)!r}\n'
        if VARIANTS[name] is not None:
            replacement = dict(VARIANTS[name], plan=dict(PLANS[plan], _delete_=True))
            text = f'_base_ = {str(REPLACED)!r}\nmodel = dict(backbone=dict(replacement={replacement!r}))\n'
        config.write_text(text)
        cost = run_training([str(ROOT / 'tools/train.py'), str(config), '--work-dir', str(folder), '--resume',
                             '--cfg-options', f'randomness.seed={seed}', f'data_root={work_dir}/data/'],
                            folder, lambda line: None)
        scalars = [json.loads(line) for path in folder.glob('*/vis_data/scalars.json')
                   for line in path.read_text().splitlines()]
        ap = [row['coco/bbox_mAP'] for row in scalars if 'coco/bbox_mAP' in row][-1]
        result.write_text(json.dumps(dict(ap=ap, seconds=cost.seconds)))
    return json.loads(result.read_text())['ap']


def page(args: argparse.Namespace, work_dir: Path) -> str:
    seeds = args.seeds
    lines = ['# What each operator does to AP on digit scenes', '',
             f'Made by `{command(args)}`, torch '
             f'{torch.__version__}, CPU. Faster R-CNN, R-34 of 16 channels, from scratch, 4 epochs of 1000 images of '
             '128×128; COCO AP on 200 validation images. A variant without a row, or with an empty cell, has not been '
             'trained. A difference of means that isn\'t larger than the standard deviations says nothing.', '']
    for plan in args.plans:
        lines += [f'## {plan}: {COUNTS[plan]} of 16 blocks replaced', '',
                  '| variant | ' + ' | '.join(f'seed {seed}' for seed in seeds)
                  + ' | mean | standard deviation | less baseline | less skip |',
                  '|---|' + '---|' * (len(seeds) + 4)]
        means: dict[str, float] = {}
        for name in VARIANTS:
            files = {seed: folder_of(name, plan, seed, work_dir) / 'ap.json' for seed in seeds}
            values = {seed: json.loads(file.read_text())['ap'] for seed, file in files.items() if file.is_file()}
            if values:
                found = list(values.values())
                spread = f'{statistics.stdev(found):.3f}' if len(found) > 1 else ''
                means[name] = statistics.mean(found)
                against = [f'{means[name] - means[other]:+.3f}' if name != other and other in means else ''
                           for other in ('baseline', 'skip')]
                lines.append(f'| {name} | ' + ' | '.join(f'{values[s]:.3f}' if s in values else '' for s in seeds)
                             + f' | {means[name]:.3f} | {spread} | {" | ".join(against)} |')
        lines.append('')
    return '\n'.join(lines)


def command(args: argparse.Namespace) -> str:
    words = ['python benchmarks/digits_operators.py --seeds', *map(str, args.seeds)]
    if args.variants != list(VARIANTS):
        words += ['--variants', shlex.join(args.variants)]
    if args.plans != list(PLANS):
        words += ['--plans', shlex.join(args.plans)]
    return ' '.join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--variants', nargs='+', choices=list(VARIANTS), default=list(VARIANTS), metavar='NAME',
                        help=f'one or more of {list(VARIANTS)} (default: all)')
    parser.add_argument('--plans', nargs='+', choices=list(PLANS), default=list(PLANS), metavar='PLAN')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/digits_operators'))
    parser.add_argument('--out', type=Path, default=OUT, help='the page to write (default: %(default)s)')
    args = parser.parse_args()
    work_dir = args.work_dir.resolve()
    for seed in args.seeds:
        for plan in args.plans:
            for name in args.variants:
                print(f'{name}, {plan}, seed {seed}: AP {train(name, plan, seed, work_dir):.3f}', flush=True)
                args.out.write_text(page(args, work_dir))
    print(args.out)


if __name__ == '__main__':
    main()
