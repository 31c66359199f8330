"""What start=dict(type='FitOutputs') costs before the first step: seconds, and memory against a training step's.

    python benchmarks/fit_cost.py --device cuda --size 800 1333 --batch 2
    python benchmarks/fit_cost.py --size 320 320 --batch 2
"""
import argparse
import json
import time

import torch
from mmdet.registry import MODELS

import rl_mmdet  # noqa: F401
from command_line import Parser, positive
from rl_mmdet.analysis import peak_memory
from rl_mmdet.replacement import fit_outputs_
from rl_mmdet.replacement.start import FitOutputs
from training_step import backbone_step

OPERATORS = ('FullBlock', 'SlimBlock')


def backbone(operator: str, device: str) -> torch.nn.Module:
    """R-50 with every second block replaced; its weights don't matter here."""
    torch.manual_seed(0)
    replacement = dict(plan=dict(type='EveryKth', k=2), operator=dict(type=operator),
                       fusion=dict(type='TransformFusion'), start=dict(type='FitOutputs'))
    model = MODELS.build(dict(type='RLResNet', depth=50, frozen_stages=1, norm_eval=True, replacement=replacement))
    model.train()
    return model.to(device)


def measure(operator: str, args: argparse.Namespace) -> dict[str, object]:
    images = torch.rand(args.batches, args.batch, 3, *args.size, generator=torch.Generator().manual_seed(0))
    model = backbone(operator, args.device)
    start = time.monotonic()

    def fit() -> None:
        fit_outputs_(model, list(images), args.steps, run=lambda whole, batch: whole(batch.to(args.device)))

    peak = peak_memory(fit, args.device) if args.device == 'cuda' else None
    if peak is None:
        fit()
    seconds = time.monotonic() - start
    step = backbone_step(backbone(operator, args.device), tuple(args.size), args.batch)
    step()
    return dict(operator=operator, seconds=round(seconds, 1), peak_of_fit=peak,
                peak_of_step=peak_memory(step, args.device))


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--size', nargs=2, type=positive, default=(320, 320), metavar=('H', 'W'))
    parser.add_argument('--batch', type=positive, default=2)
    parser.add_argument('--batches', type=positive, default=FitOutputs().batches)
    parser.add_argument('--steps', type=positive, default=FitOutputs().steps)
    parser.add_argument('--operators', nargs='+', choices=OPERATORS, default=OPERATORS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    name = torch.cuda.get_device_name() if args.device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    print(f'{name}: R-50, k=2, {args.batch}x3x{args.size[0]}x{args.size[1]}, {args.steps} steps on {args.batches} '
          'batches')
    for operator in args.operators:
        print(json.dumps(measure(operator, args)), flush=True)


if __name__ == '__main__':
    main()
