"""What a training step costs on a CPU: plain and folded baseline, each way of replacing blocks, and what else saves.

For backbones alone, on random images: trainable parameters, FLOPs, tensor calls, bytes saved for backward, peak memory,
the step's time against the plain baseline's, and the share of what leaving the blocks out (skip) saves. All variants
(see step_variants.py) take turns in one process. Writes OUT.md and OUT.json after every configuration. Whole detectors,
on a GPU: gpu.py.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --config configs/rl_resnet/retinanet_rl-r50-k2_fpn_1x_coco.py --variants skip slim
"""
import argparse
import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from command_line import Parser, positive, processor
from rl_mmdet.analysis import (
    count_flops,
    mean_over_steps,
    peak_memory,
    ratios_to,
    saved_bytes,
    seconds_in_turn,
    trainable_parameters,
)
from rl_mmdet.replacement import set_step_
from step_variants import (
    FOLD,
    MASK_R50,
    MASK_R101,
    ROOT,
    SWIN_T,
    VARIANTS,
    VIT_B,
    Case,
    Subject,
    chosen_blocks,
    is_folded,
    read_model,
)
from training_step import TrainingStep
from zoo.reasons import short_reason

COUNTS = {'flops': 'FLOPs', 'saved': 'saved bytes', 'peak': 'peak memory', 'time': 'time'}
NAMES = ('baseline', 'folded', *(name + fold for fold in ('', FOLD) for name in VARIANTS if name != 'baseline'))
ALSO_FOLDED = ('skip', 'every-8', 'recompute', 'slim')
COUNTED = ('baseline', 'folded', 'skip', 'every-1', 'every-8', 'recompute', 'slim', 'slim-kept', 'slim-coupled',
           'frozen', 'checkpoint', *(name + FOLD for name in ALSO_FOLDED))
TIMED = ('baseline', 'skip', 'every-1', 'every-8', 'slim')
CASES = (
    *(Case(config, 'backbone', (320, 320), variants=TIMED) for config in (MASK_R50, MASK_R101, SWIN_T, VIT_B)),
    *(Case(config, 'backbone', (640, 640), variants=TIMED) for config in (MASK_R50, MASK_R101)),
)
LARGE = ('baseline', 'folded', *ALSO_FOLDED, *(name + FOLD for name in ALSO_FOLDED))
COUNT_ONLY = (*(replace(case, variants=COUNTED) for case in CASES[:4]),
              Case(MASK_R50, 'backbone', (800, 1344), variants=LARGE))
VIEWS = {'alias', 'as_strided', 'detach', 'empty', 'expand', 'is_set_to', 'permute', 'select', 'slice', 'split',
         'split_with_sizes', 'squeeze', 't', 'transpose', 'unbind', 'unsqueeze', 'view', '_reshape_alias',
         '_unsafe_view'}
"""Tensor operations that compute nothing."""


def measure(subject: Subject) -> dict[str, Any]:
    """What doesn't depend on the machine's speed."""
    step, model = subject.step, subject.step.model
    step()  # the first one is different: momentum is made, cheap gradients are checked
    outputs: list[torch.Tensor] = []
    set_step_(model, 0)
    torch.manual_seed(0)
    saved = saved_bytes(model, lambda: outputs.extend(step.forward()), subject.checkpointed)
    if not all(output.isfinite().all() for output in outputs):
        raise ArithmeticError('the step gives numbers that aren\'t finite')
    outputs.clear()
    flops, calls = (mean_over_steps(model, lambda count=count: of_one_step(step, count))
                    for count in (count_flops, count_calls))
    torch.manual_seed(0)
    return dict(parameters=trainable_parameters(model), flops=flops, calls=calls, saved=saved,
                peak=peak_memory(step, step.device))


def of_one_step(step: TrainingStep, count: Callable[[Callable[[], None]], int]) -> int:
    """A count of forward and backward."""
    torch.manual_seed(0)
    counted = count(step.forward_backward)
    step.optimizer.zero_grad()
    return counted


class CallCounter(TorchDispatchMode):
    """Counts the tensor operations that compute something: each is at least one kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func.__name__.partition('.')[0] not in VIEWS
        return func(*args, **(kwargs or {}))


def count_calls(run: Callable[[], object]) -> int:
    """How many tensor operations ``run`` makes."""
    with CallCounter() as counter:
        run()
    return counter.count


def measure_case(case: Case, rounds: int) -> dict[str, Any]:
    """All numbers of one table; without times where ``rounds`` is 0, and then one model is there at a time."""
    title = f'{case}' if rounds else f'{case}, no times'
    found: dict[str, Any] = dict(title=title, rows={}, left_out={}, blocks={}, reason='')
    print(title, flush=True)
    try:
        found['blocks'], blocks = chosen_blocks(case)
    except Exception as error:  # models raise whatever they like
        return found | dict(reason=f'nothing measured: {brief(error)}')
    steps: dict[str, TrainingStep] = {}
    source: nn.Module | None = None
    for name in case.variants:
        if is_folded(name) and 'folded' in found['left_out']:
            found['left_out'][name] = found['left_out']['folded']
            continue
        try:
            subject = Subject(case, name, found['blocks'], blocks, 'cpu', source)
            found['rows'][name] = measure(subject)
            source = source or subject.step.model
            if rounds:
                steps[name] = subject.step
        except Exception as error:  # models raise whatever they like
            found['left_out'][name] = brief(error)
        print(f'  {name}: {found["rows"].get(name) or found["left_out"][name]}', flush=True)
        subject = None
        gc.collect()
    add_times_(found['rows'], steps, rounds)
    add_shares_(found['rows'])
    return found


def brief(error: Exception) -> str:
    """The beginning of an error's text: what it is, without the advice."""
    return short_reason(error).split('; ')[0]


def add_times_(rows: dict[str, dict], steps: dict[str, TrainingStep], rounds: int) -> None:
    """Let the steps take turns."""
    taken = seconds_in_turn(steps, rounds, 1, time.process_time) if 'baseline' in steps else {}
    for name, ratios in ratios_to(taken, 'baseline').items() if taken else ():
        rows[name].update(ratios=ratios, time=sum(taken[name]) / sum(taken['baseline']))


def add_shares_(rows: dict[str, dict]) -> None:
    """The part of what skip saves of its baseline, plain or folded, that each variant saves."""
    for name, row in rows.items():
        base, skip = ('folded', 'skip' + FOLD) if is_folded(name) else ('baseline', 'skip')
        row['shares'] = {}
        for count in COUNTS:
            values = [rows.get(each, {}).get(count) for each in (base, name, skip)]
            if name != base and None not in values and values[0] > values[2]:
                row['shares'][count] = (values[0] - values[1]) / (values[0] - values[2])


def table(found: dict) -> list[str]:
    """One case as Markdown."""
    lines = [f'## {found["title"]}', '']
    if found['rows']:
        titles = ['variant', 'trainable parameters, M', 'forward + backward, GFLOPs', 'calls', 'calls, × baseline',
                  'saved, MB', 'peak, MB', 'peak, × baseline', 'time, × baseline (range)',
                  *(f'share of {what}' for what in COUNTS.values())]
        lines += [f'| {" | ".join(titles)} |', '|' + '---|' * len(titles)]
        lines += [f'| {name} | {" | ".join(cells(row, found["rows"].get("baseline", {})))} |'
                  for name, row in found['rows'].items()]
        lines.append('')
    lines += [found['reason'] or f'Blocks: {found["blocks"]}.', '']
    reasons: dict[str, list[str]] = {}
    for name, reason in found['left_out'].items():
        reasons.setdefault(reason, []).append(name)
    lines += [f'- left out: {", ".join(names)}: {reason}' for reason, names in reasons.items()]
    return lines + ([''] if reasons else [])


def cells(row: dict, base: dict) -> list[str]:
    time = f'{row["time"]:.3f} ({min(row["ratios"]):.3f} to {max(row["ratios"]):.3f})' if 'time' in row else ''
    shares = [f'{row["shares"][count]:.2f}' if count in row['shares'] else '' for count in COUNTS]
    return [f'{row["parameters"] / 1e6:.2f}', f'{row["flops"] / 1e9:.2f}', f'{row["calls"]:.0f}',
            f'{row["calls"] / base["calls"]:.2f}' if 'calls' in base else '', f'{row["saved"] / 1e6:.1f}',
            f'{row["peak"] / 1e6:.1f}', f'{row["peak"] / base["peak"]:.3f}' if 'peak' in base else '', time, *shares]


def page(results: dict) -> str:
    """All of it as Markdown."""
    lines = ['# What a training step costs', '', f'Made by `{results["command"]}`.',
             f'torch {results["torch"]}, {results["device"]}. All variants in one process, taking turns for '
             f'{results["rounds"]} rounds; time is the ratio of CPU time to the plain baseline\'s over all rounds, in '
             'brackets the range of the rounds\'.', '',
             'A step is forward, loss, backward, SGD with momentum at a learning rate of 0, and zero_grad. The loss is '
             'a fixed random projection of the backbone\'s maps. All variants are about the same blocks, those that '
             '`EveryKth(k=2)` replaces, and have the same weights.', '',
             'Replaced blocks learn in one of eight steps unless their name says otherwise: FLOPs and calls are the '
             'mean over eight steps, saved bytes and peak are of a step in which one block learns, times of eight. '
             'Calls are tensor operations that compute something; on a GPU each is at least one kernel.', '',
             'FLOPs by torch.utils.flop_counter with corrected formulas (`rl_mmdet.analysis.count_flops`). Saved bytes '
             'are those of distinct storages kept for backward, without parameters and buffers. Peak memory is what a '
             'step needs beyond the model, its momentum and the batch: the highest sum of allocations less releases in '
             'torch.profiler\'s record of the CPU allocator; at these sizes most of it are the gradients of the '
             'weights. Share: (baseline − ours) / (baseline − skip); of a variant with +fold: (folded − ours) / '
             '(folded − skip+fold).', '']
    return '\n'.join([*lines, *(line for found in results['cases'] for line in table(found))]).rstrip() + '\n'


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--config', nargs='+', help='config files, or mmdet::PATH for mmdet\'s own; by default the '
                        'cases of docs/results/train_step.md')
    parser.add_argument('--variants', nargs='+', metavar='NAME', help='all by default; the baseline is always there')
    parser.add_argument('--size', nargs=2, type=positive, default=(256, 256), metavar=('H', 'W'),
                        help='with --config: of the images (default: 256 256)')
    parser.add_argument('--batch', type=positive, default=1, help='with --config: images of a step (default: 1)')
    parser.add_argument('--count-only', action='store_true', help='no times, one model at a time')
    parser.add_argument('--rounds', type=positive, default=8)
    parser.add_argument('--out', type=Path, default=ROOT / 'docs/results/train_step',
                        help='the page and its data, without suffix (default: docs/results/train_step)')
    args = parser.parse_args()
    wrong = [name for name in args.variants or [] if name not in NAMES]
    if wrong:
        parser.error(f'--variants: unknown {wrong[0]!r}; allowed: {", ".join(NAMES)}')
    for config in args.config or []:
        reason = read_model(config)[1]
        if reason:
            parser.error(f'--config {config}: {reason}; allowed: a detector\'s config file, or mmdet::PATH below '
                         'mmdet\'s folder of configs, such as ' + MASK_R50)
    return args


def cases_of(args: argparse.Namespace) -> list[tuple[Case, int]]:
    """What is to be measured, and in how many rounds."""
    if args.config:
        cases = [Case(config, 'backbone', tuple(args.size), args.batch, variants=COUNTED) for config in args.config]
        found = [(case, args.rounds) for case in cases]
    else:
        found = [(case, args.rounds) for case in CASES] + [(case, 0) for case in COUNT_ONLY]
    if args.variants:  # the baseline first, nothing twice
        found = [(replace(case, variants=tuple(dict.fromkeys(['baseline', *args.variants]))), rounds)
                 for case, rounds in found]
    return [(case, 0) for case, _ in found] if args.count_only else found


def main() -> None:
    args = parse()
    os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # else the profiler complains about a GPU that isn't there
    threads = torch.get_num_threads()
    device = f'{threads} thread{"s" if threads > 1 else ""} of {processor()}'
    results: dict[str, Any] = dict(torch=torch.__version__, device=device, rounds=args.rounds,
                                   command=shlex.join(['python', *sys.argv]), cases=[])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for case, rounds in cases_of(args):
        results['cases'].append(dict(measure_case(case, rounds), case=asdict(case)))
        gc.collect()
        args.out.with_suffix('.json').write_text(json.dumps(results, indent=1) + '\n')
        args.out.with_suffix('.md').write_text(page(results))
    print(args.out.with_suffix('.md'))


if __name__ == '__main__':
    main()
