"""What limits a fitted start: the part of removed blocks' effect that width, rank, steps or batches leave unexplained.

MobileNetV2 from ImageNet weights, Aquarium at 320 px, the four blocks replaced that benchmarks/aquarium.py replaces.
Every row is a fit of its own; what is left unexplained is measured on training images that no fit has seen.

    python benchmarks/fit_limits.py --data DIR --weights mobilenet-v2_imagenet.pth --out docs/results/fit_limits.md
"""
import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from aquarium import BLOCKS, CONFIG
from command_line import Parser, positive
from comparison_scripts import ROOT
from rl_mmdet.analysis.choose_blocks import calibration_batches
from rl_mmdet.engine import build_model, load_checkpoint_, load_config
from rl_mmdet.replacement import fit_outputs_
from rl_mmdet.replacement.start import FitOutputs

HELD_OUT = 8
FIT = {key: getattr(FitOutputs(), key) for key in ('batches', 'steps')}
DEFAULTS = {'Skip': {}, 'RL-v1': {}, 'FullBlock': dict(share=0.2), 'SlimBlock': dict(width=0.25, rank=16)}
CHANGES = {
    'Skip': [],
    'RL-v1': [],
    'FullBlock': [dict(share=0.05), dict(share=1.0), dict(steps=50), dict(steps=500), dict(batches=5),
                  dict(batches=60)],
    'SlimBlock': [dict(width=0.125), dict(width=1.0), dict(rank=4), dict(steps=50), dict(steps=500), dict(batches=5)],
}
"""By operator, what a row changes of ``DEFAULTS`` and ``FIT``."""


def trials() -> Iterator[tuple[str, dict[str, Any]]]:
    for operator, changes in CHANGES.items():
        yield from ((operator, change) for change in [{}, *changes])


def settings(operator: str, width: float = 0, **fusion: Any) -> dict[str, Any]:
    """The backbone's ``replacement``."""
    chosen = dict(type='FullBlock' if operator == 'RL-v1' else operator)
    fusion = dict(fusion, type='TransformFusion' if fusion else 'ScalarFusion', adapt=operator == 'SlimBlock')
    return dict(plan=dict(type='Blocks', blocks=BLOCKS), operator=chosen | (dict(width=width) if width else {}),
                fusion=fusion, start=dict(type='FitOutputs'))


def replaced_backbone(operator: str, change: dict[str, Any]) -> nn.Module:
    """The backbone of a row."""
    changed = {key: value for key, value in (DEFAULTS[operator] | change).items() if key not in FIT}
    backbone = dict(type='RLBackbone', backbone='MobileNetV2', out_indices=(2, 4, 6), frozen_stages=1, norm_eval=True,
                    replacement=settings(operator, **changed))
    return build_model(Config(dict(model=backbone, default_scope='mmdet')))


def measure(args: argparse.Namespace, images: list[Tensor], operator: str, change: dict[str, Any]) -> list[str]:
    """A row of the table."""
    fit, model = FIT | change, replaced_backbone(operator, change)
    load_checkpoint_(model, args.weights)
    model.train()
    fit_outputs_(model, images[HELD_OUT:][:fit['batches']], fit['steps'], keep=True)
    unseen = fit_outputs_(model, images[:HELD_OUT], steps=0, keep=True)
    words = ', '.join(f'{key}={value}' for key, value in change.items()) or 'as in benchmarks/aquarium.py'
    errors = [error.after for error in unseen.values()]
    return [operator, words, f'{model.replacement_report.learnable:,}',
            *(f'{error:.3f}' for error in (*errors, mean(errors)))]


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--data', required=True, help='folder with annotations/ and images/')
    parser.add_argument('--weights', required=True, help="ImageNet weights in the layout of mmdet's MobileNetV2")
    parser.add_argument('--batch-size', type=positive, default=4)
    parser.add_argument('--out', type=Path, required=True, help='the page; rows are added as they come')
    return parser.parse_args()


def main() -> None:
    args = parse()
    options = {'data_root': f'{args.data}/', 'train_dataloader.batch_size': args.batch_size}
    most = max(change.get('batches', 0) for changes in CHANGES.values() for change in changes)
    images = calibration_batches(load_config(str(ROOT / CONFIG), options), most + HELD_OUT)
    columns = ['operator', 'changed', 'learned', *(f'{stage}.{index}' for stage, [index] in BLOCKS.items()), 'mean']
    page = ['# What limits a fitted start', '', *__doc__.splitlines()[2:4], '',
            'e = ‖C(h) − B(h\')‖ / ‖B(h\') − h\'‖, as docs/pretrained.md says. '
            f'{FIT["batches"]} batches of {args.batch_size} images and {FIT["steps"]} steps unless a row says '
            f'otherwise; e is of {HELD_OUT} more batches. torch {torch.__version__}, CPU.', '',
            '| ' + ' | '.join(columns) + ' |', '|---|---|' + '---:|' * (len(columns) - 2)]
    for operator, change in trials():
        page.append('| ' + ' | '.join(measure(args, images, operator, change)) + ' |')
        print(page[-1], flush=True)
        args.out.write_text('\n'.join(page) + '\n')


if __name__ == '__main__':
    main()
