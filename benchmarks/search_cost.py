"""What a step of a search costs, beside a step of the baseline: FLOPs, bytes saved for backward, time.

Backbones with random weights, frozen stem and first stage, BatchNorm in eval mode, SGD; one step is sampling, forward,
backward, the optimizer's step and learning. A search for a plan is measured at its beginning, when both branches of all
open blocks run, and when all gates are settled; on average over a search it costs three quarters of the first and a
quarter of the second. FLOPs and bytes are means over gates and over steps in which replaced blocks learn and others,
times medians of ratios to the baseline's step, taken in turns in one process.

    python benchmarks/search_cost.py
"""
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from mmdet.registry import MODELS
from torch import nn

from command_line import Parser, positive
from rl_mmdet.analysis import count_flops, ratios_to, saved_bytes, seconds_in_turn
from rl_mmdet.replacement import set_step_
from rl_mmdet.search import begin_search

OUT = Path(__file__).resolve().parents[1] / 'docs/results/search_cost.md'
STEPS = 1_000_000
"""Length of the searches: so long that no gate settles by itself."""
BACKBONES = {
    'R-50': dict(type='RLResNet', depth=50, frozen_stages=1, norm_eval=True),
    'R-101': dict(type='RLResNet', depth=101, frozen_stages=1, norm_eval=True),
    'Swin-T': dict(type='RLSwin', drop_path_rate=0.),
}
BUDGETS = {'R-50': 0.705, 'R-101': 0.6, 'Swin-T': 0.88}
SEARCHES: dict[str, Callable[[float], dict[str, Any]]] = {
    'plan, RL-v1, `every=1`': lambda share: dict(replacement=dict(plan=learned(share), gradient=dict(every=1))),
    'plan, RL-v1, `every=8`': lambda share: dict(replacement=dict(plan=learned(share), gradient=dict(every=8))),
    'transfer, SWR': lambda share: dict(transfer=dict(type='SWR', budget=0.1)),
}


def learned(share: float) -> dict[str, Any]:
    return dict(type='LearnedPlan', budget=dict(params=share), seed=0)


class Subject:
    """A backbone, its optimizer and, if it has one, its search."""

    def __init__(self, cfg: dict[str, Any], image: torch.Tensor) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = MODELS.build(dict(cfg))
        self.model.train()
        self.image = image
        searched = any(key in cfg for key in ('replacement', 'transfer'))
        self.search = begin_search(self.model, STEPS) if searched else None
        learn = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(learn, 1e-6, momentum=0.9)
        self.optimizer.register_step_pre_hook(lambda *_: self.search and self.search.look())
        self.steps = 0

    def forward(self) -> torch.Tensor:
        return sum(out.square().mean() for out in self.model(self.image))

    def step(self) -> None:
        set_step_(self.model, self.steps)
        self.steps += 1
        if self.search is not None:
            self.search.sample()
        self.forward().backward()
        self.optimizer.step()
        if self.search is not None:
            self.search.learn()
        self.optimizer.zero_grad()

    def settle(self) -> None:
        for index, gate in enumerate(self.search.best()):
            self.search.policy.settle(index, gate)

    def flops(self, draws: int) -> float:
        return mean(count_flops(self.step) for _ in range(draws))

    def saved(self, draws: int) -> float:
        kept = []
        for step in range(draws):
            set_step_(self.model, step)
            if self.search is not None:
                self.search.sample()
            kept.append(saved_bytes(self.model, self.forward))
        return mean(kept)


def rows_of(name: str, image: torch.Tensor, rounds: int, draws: int) -> list[tuple]:
    baseline = Subject(BACKBONES[name], image)
    subjects = {f'{kind}, at its beginning': Subject(BACKBONES[name] | more(BUDGETS[name]), image)
                for kind, more in SEARCHES.items()}
    for kind, more in SEARCHES.items():
        if 'plan' in kind:
            settled = Subject(BACKBONES[name] | more(BUDGETS[name]), image)
            settled.settle()
            subjects[f'{kind}, all settled'] = settled
    steps = {key: subject.step for key, subject in dict(subjects, baseline=baseline).items()}
    ratios = ratios_to(seconds_in_turn(steps, rounds, 1), 'baseline')
    flops, saved = baseline.flops(1), baseline.saved(1)
    return [(name, key, subject.flops(draws) / flops, subject.saved(draws) / saved, sorted(ratios[key]))
            for key, subject in subjects.items()]


def table(rows: list[tuple]) -> list[str]:
    lines = ['| backbone | search | FLOPs of a step | saved for backward | time of a step: median (all rounds) |',
             '|---|---|---:|---:|---:|']
    return lines + [f'| {name} | {key} | {flops:.2f} | {saved:.2f} | {median(times):.2f} ({times[0]:.2f} to '
                    f'{times[-1]:.2f}) |' for name, key, flops, saved, times in rows]


def over_a_search(rows: list[tuple]) -> list[str]:
    measured = {(name, key): (flops, median(times)) for name, key, flops, _, times in rows}
    lines = ['| backbone | search | FLOPs | time |', '|---|---|---:|---:|']
    for (name, key), start in measured.items():
        kind, _, when = key.rpartition(', ')
        if when == 'at its beginning':
            end = measured.get((name, f'{kind}, all settled'), start)
            flops, seconds = (0.75 * first + 0.25 * last for first, last in zip(start, end, strict=True))
            lines.append(f'| {name} | {kind} | {flops:.2f} | {seconds:.2f} |')
    return lines


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('--size', type=positive, default=256, help='side of the images, in pixels')
    parser.add_argument('--rounds', type=positive, default=9)
    parser.add_argument('--draws', type=positive, default=8,
                        help='steps, each with its own gates, that FLOPs and saved bytes are averaged over')
    parser.add_argument('--backbones', nargs='+', choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument('--out', type=Path, default=OUT)
    args = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.set_default_device(device)
    image = torch.randn(2, 3, args.size, args.size)
    rows = [row for name in args.backbones for row in rows_of(name, image, args.rounds, args.draws)]
    threads = f'CPU ({platform.machine()}, threads: {torch.get_num_threads()})'
    where = torch.cuda.get_device_name() if device.type == 'cuda' else threads
    text = ['# What a search costs', '', ' '.join(__doc__.split('    python')[0].split()), '',
            f'Made by `python benchmarks/search_cost.py`: 2×3×{args.size}×{args.size}, {where}, '
            f'torch {torch.__version__}. Everything as a share of the baseline\'s.', '',
            '## A step', '', *table(rows), '', '## A whole search', '',
            'On average over its steps; a baseline run of the same length is 1.', '', *over_a_search(rows), '']
    args.out.write_text('\n'.join(text))
    print('\n'.join(text))


if __name__ == '__main__':
    main()
