"""What a training step costs: plain and folded baseline, each way of replacing blocks, and what else saves.

For backbones alone and for whole detectors, on synthetic images: trainable parameters, FLOPs, tensor calls, bytes saved
for backward, peak memory, the step's time against the plain baseline's, and the share of what leaving the blocks out
(skip) saves. All variants take turns in one process. Writes OUT.md and OUT.json after every configuration.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda --resume
    python benchmarks/train_step.py --config configs/rl_resnet/retinanet_rl-r50-k2_fpn_1x_coco.py --variants skip slim

Variants replace, freeze, checkpoint or leave out the same blocks; NAME+fold also folds BatchNorm in all others:

    baseline, folded   nothing replaced, without and with fold_norm=True
    skip               the blocks left out: the yardstick
    every-1, every-8   RL-v1, learning in every step (plain autograd) or in one of eight
    recompute          every-8 with recompute=True
    depthwise, slim    light operators: DepthwiseBlock and SlimBlock
    frozen             the blocks kept, their parameters frozen
    checkpoint         the blocks kept, each run by torch.utils.checkpoint
"""
import argparse
import gc
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rl_mmdet  # noqa: F401
from command_line import Parser, positive
from rl_mmdet.analysis import (
    count_flops,
    mean_over_steps,
    peak_memory,
    ratios_to,
    saved_bytes,
    seconds_in_turn,
    trainable_parameters,
)
from rl_mmdet.engine import build_model
from rl_mmdet.replacement import set_step_
from training_step import TrainingStep, backbone_step, counted_regions, detector_step
from zoo.configs import ROOT as MMDET_CONFIGS
from zoo.configs import read_config, without_synchronisation
from zoo.reasons import short_reason
from zoo.swap import rl_twin

ROOT = Path(__file__).resolve().parents[1]
FOLD = '+fold'
AMP = {'off': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
FULL_SIZE = (800, 1333)
COUNTS = {'flops': 'FLOPs', 'saved': 'saved bytes', 'peak': 'peak memory', 'time': 'time'}
VIEWS = {'alias', 'as_strided', 'detach', 'empty', 'expand', 'is_set_to', 'permute', 'select', 'slice', 'split',
         'split_with_sizes', 'squeeze', 't', 'transpose', 'unbind', 'unsqueeze', 'view', '_reshape_alias',
         '_unsafe_view'}
"""Tensor operations that compute nothing."""
Blocks = dict[str, list[int]]


@dataclass(frozen=True)
class Variant:
    """What is done to the chosen blocks: they are replaced, or kept and changed."""
    replacement: dict | None = None
    change: Callable[[list[nn.Module]], None] | None = None


def replaced(operator: str, **gradient: Any) -> Variant:
    return Variant(dict(operator=dict(type=operator), gradient=gradient))


def freeze(blocks: list[nn.Module]) -> None:
    for block in blocks:
        block.requires_grad_(False)


def checkpoint_all(blocks: list[nn.Module]) -> None:
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


VARIANTS = {
    'baseline': Variant(),
    'skip': replaced('Skip'),
    'every-1': replaced('FullBlock', every=1),
    'every-8': replaced('FullBlock', every=8),
    'recompute': replaced('FullBlock', every=8, recompute=True),
    'depthwise': replaced('DepthwiseBlock', every=8),
    'slim': replaced('SlimBlock', every=8),
    'frozen': Variant(change=freeze),
    'checkpoint': Variant(change=checkpoint_all),
}
NAMES = ('baseline', 'folded', *(name + fold for fold in ('', FOLD) for name in VARIANTS if name != 'baseline'))
MAIN = ('baseline', 'folded', 'skip', 'every-1', 'every-8', 'recompute', 'depthwise', 'slim', 'frozen', 'checkpoint',
        *(name + FOLD for name in ('skip', 'every-8', 'recompute', 'depthwise', 'slim')))
TIMED = ('baseline', 'skip', 'every-1', 'every-8', 'slim')


@dataclass(frozen=True)
class Case:
    """One table: what is trained, and how."""
    config: str
    part: str
    size: tuple[int, int]
    batch: int = 1
    amp: str = 'off'
    channels_last: bool = False
    count_only: bool = False
    k: int = 2
    variants: tuple[str, ...] = MAIN

    def __str__(self) -> str:
        how = ['' if self.amp == 'off' else self.amp, 'channels_last' if self.channels_last else '',
               'no times' if self.count_only else '', '' if self.k == 2 else f'k={self.k}']
        return ', '.join([f'{Path(self.config).stem}, {self.part}, {self.batch}×3×{"×".join(map(str, self.size))}',
                          *filter(None, how)])


FASTER_R50 = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
MASK_R50 = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
MASK_R101 = 'mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py'
RETINA_R50 = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
SWIN_T = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
VIT_B = 'configs/rl_vit/mask-rcnn_vit-b-mae_simple-fpn_16xb4-lsj-100e_coco.py'
DETECTORS = (MASK_R101, MASK_R50, FASTER_R50, RETINA_R50, SWIN_T, VIT_B)
SMALL = (256, 256)
CPU_CASES = (
    *(Case(config, 'backbone', (320, 320), variants=TIMED) for config in (MASK_R50, MASK_R101, SWIN_T, VIT_B)),
    *(Case(config, 'backbone', (640, 640), variants=TIMED) for config in (MASK_R50, MASK_R101)),
    *(Case(config, 'backbone', (320, 320), count_only=True) for config in (MASK_R50, MASK_R101, SWIN_T, VIT_B)),
)
GPU_CASES = (
    *(Case(MASK_R101, 'detector', FULL_SIZE, batch, 'bf16', last) for batch in (2, 8) for last in (True, False)),
    *(Case(config, 'detector', (1024, 1024) if config == VIT_B else FULL_SIZE, batch, 'bf16')
      for batch in (2, 8) for config in DETECTORS if config != MASK_R101),
)
PRESETS = {'cpu': CPU_CASES, 'gpu': GPU_CASES}


def unfolded(name: str) -> str:
    """The variant without folding."""
    return 'baseline' if name == 'folded' else name.removesuffix(FOLD)


def is_folded(name: str) -> bool:
    return name == 'folded' or name.endswith(FOLD)


def read_model(config: str) -> tuple[dict, str]:
    """The model of a config, with its plain backbone and nothing to be loaded; or why there is none."""
    path = MMDET_CONFIGS / config.removeprefix('mmdet::') if config.startswith('mmdet::') else Path(config)
    path = path if path.is_absolute() or path.exists() else ROOT / path
    found = read_config(str(path.resolve()))
    if found.model is None or 'backbone' not in found.model:
        return {}, found.reason or 'its model has no backbone'
    model = without_synchronisation(found.model)
    for setting in ('replacement', 'fold_norm'):
        model['backbone'].pop(setting, None)
    if model.get('data_preprocessor'):
        model['data_preprocessor']['batch_augments'] = None  # which would bring all images to one size
    return model, ''


def with_fitting_regions(model: dict, size: Sequence[int]) -> dict:
    """Let the second stage of a detector sample as many regions per pixel of a small image as of one of 800×1333."""
    part = min(1., size[0] * size[1] / (FULL_SIZE[0] * FULL_SIZE[1]))
    stages = (model.get('train_cfg') or {}).get('rcnn') or []
    for stage in stages if isinstance(stages, (list, tuple)) else [stages]:
        if 'num' in (stage.get('sampler') or {}):
            stage['sampler']['num'] = max(8, round(stage['sampler']['num'] * part))
    return model


def build(case: Case, name: str, plan: Mapping[str, Any]) -> nn.Module:
    """The backbone or detector of a variant; raises UserError for what the backbone can't have."""
    torch.manual_seed(0)
    model, _ = read_model(case.config)
    variant, backbone = VARIANTS[unfolded(name)], model['backbone']
    if variant.replacement or is_folded(name):
        backbone = rl_twin(backbone) | (dict(fold_norm=True) if is_folded(name) else {})
    if variant.replacement:
        backbone = dict(backbone, replacement=dict(variant.replacement, plan=plan))
    model = backbone if case.part == 'backbone' else dict(with_fitting_regions(model, case.size), backbone=backbone)
    built = build_model(Config(dict(model=model)))
    built.train()
    return built


def backbone_of(model: nn.Module) -> nn.Module:
    return getattr(model, 'backbone', model)


def chosen_blocks(case: Case) -> tuple[Blocks, list[str]]:
    """The blocks that every variant is about: as a choice and by name in the backbone."""
    report = backbone_of(build(case, 'every-8', dict(type='EveryKth', k=case.k))).replacement_report
    return report.replaced, [row.name for row in report.rows if row.replaced]


def share_weights_(model: nn.Module, source: nn.Module) -> None:
    """Let the model's parameters lie where those of the same name in ``source`` do: nobody changes them."""
    theirs = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs:
            parameter.data = theirs[name].data


class Subject:
    """One variant of a case, ready to be measured."""

    def __init__(self, case: Case, name: str, choice: Blocks, blocks: list[str], device: str,
                 source: nn.Module | None) -> None:
        model = build(case, name, dict(type='Blocks', blocks=choice)).to(device)
        if case.channels_last:
            model.to(memory_format=torch.channels_last)
        if source is not None:
            share_weights_(model, source)
        kept = [backbone_of(model).get_submodule(block) for block in blocks]
        change = VARIANTS[unfolded(name)].change
        if change is not None:
            change(kept)
        make = backbone_step if case.part == 'backbone' else detector_step
        self.step: TrainingStep = make(model, case.size, case.batch, AMP[case.amp])
        self.checkpointed = kept if change is checkpoint_all else []

    def measure(self) -> dict[str, Any]:
        """What doesn't depend on the machine's speed."""
        step, model = self.step, self.step.model
        with counted_regions(model) as regions:
            step()  # the first one is different: momentum is made, cheap gradients are checked
        outputs: list[torch.Tensor] = []
        set_step_(model, 0)
        torch.manual_seed(0)
        saved = saved_bytes(model, lambda: outputs.extend(step.forward()), self.checkpointed)
        if not all(output.isfinite().all() for output in outputs):
            raise ArithmeticError('the step gives numbers that aren\'t finite')
        outputs.clear()
        flops = mean_over_steps(model, lambda: self.of_one_step(count_flops))
        calls = mean_over_steps(model, lambda: self.of_one_step(count_calls))
        torch.manual_seed(0)
        return dict(parameters=trainable_parameters(model), flops=flops, calls=calls, saved=saved,
                    peak=peak_memory(step, step.device), regions=regions)

    def of_one_step(self, count: Callable[[Callable[[], None]], int]) -> int:
        """A count of forward and backward."""
        torch.manual_seed(0)
        counted = count(self.step.forward_backward)
        self.step.optimizer.zero_grad()
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


def measure_case(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """All numbers of one table."""
    found: dict[str, Any] = dict(title=str(case), case=asdict(case), rows={}, left_out={}, blocks={}, reason='')
    try:
        found['blocks'], blocks = chosen_blocks(case)
    except Exception as error:  # models raise whatever they like
        return found | dict(reason=f'nothing measured: {brief(error)}')
    steps: dict[str, TrainingStep] = {}
    source = None
    for name in case.variants:
        if is_folded(name) and 'folded' in found['left_out']:
            found['left_out'][name] = found['left_out']['folded']
            continue
        try:
            subject = Subject(case, name, found['blocks'], blocks, device, source)
            found['rows'][name] = subject.measure()
            source = source or subject.step.model
            if not case.count_only:
                steps[name] = subject.step
        except torch.cuda.OutOfMemoryError:
            found['rows'][name] = dict(out_of_memory=True)
        except Exception as error:  # models raise whatever they like
            found['left_out'][name] = brief(error)
        row = found['rows'].get(name)
        print(f'  {name}: {describe(row) if row else found["left_out"][name]}', flush=True)
        subject = None
        clear(device)
    if steps:
        add_times_(found, steps, device, rounds)
    add_shares_(found['rows'])
    return found


def brief(error: Exception) -> str:
    """The beginning of an error's text: what it is, without the advice."""
    return short_reason(error).split('; ')[0]


def describe(row: dict[str, Any]) -> str:
    if row.get('out_of_memory'):
        return 'out of memory'
    return (f'{row["parameters"] / 1e6:.2f} M parameters, {row["flops"] / 1e9:.2f} GFLOPs, {row["calls"]:.0f} calls, '
            f'{row["saved"] / 1e6:.1f} MB saved, {row["peak"] / 1e6:.1f} MB at the peak')


def clear(device: str) -> None:
    gc.collect()
    if device == 'cuda':
        torch.cuda.empty_cache()


def add_times_(found: dict, steps: dict[str, TrainingStep], device: str, rounds: int) -> None:
    """Let the steps take turns."""
    cuda = device == 'cuda'
    try:
        taken = seconds_in_turn(steps, rounds, 8 if cuda else 1, time.perf_counter if cuda else time.process_time)
    except torch.cuda.OutOfMemoryError:
        found['reason'] = 'No times: out of memory while all variants were there.'
        return
    ratios = ratios_to(taken, 'baseline') if 'baseline' in taken else {}
    for name, seconds in taken.items():
        if name in ratios:
            found['rows'][name].update(ratios=ratios[name], time=sum(seconds) / sum(taken['baseline']))
        if cuda:
            found['rows'][name]['milliseconds'] = [1e3 * each for each in seconds]


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
                  'saved, MB', 'peak, MB',
                  'peak, × baseline', 'time, × baseline (range)', *(f'share of {what}' for what in COUNTS.values())]
        lines += [f'| {" | ".join(titles)} |', '|' + '---|' * len(titles)]
        lines += [f'| {name} | {" | ".join(cells(row, found["rows"].get("baseline", {})))} |'
                  for name, row in found['rows'].items()]
        lines.append('')
    regions = next((row['regions'] for row in found['rows'].values() if row.get('regions')), None)
    notes = [found['reason']] if found['reason'] else []
    notes += [f'Blocks: {found["blocks"]}.'] if found['blocks'] else []
    notes += ['Regions: ' + ', '.join(f'{count} in {name}' for name, count in regions.items()) + '.'] if regions else []
    lines += notes and [' '.join(notes), '']
    reasons: dict[str, list[str]] = {}
    for name, reason in found['left_out'].items():
        reasons.setdefault(reason, []).append(name)
    lines += [f'- left out: {", ".join(names)}: {reason}' for reason, names in reasons.items()]
    return lines + ([''] if reasons else [])


def cells(row: dict, base: dict) -> list[str]:
    if row.get('out_of_memory'):
        return ['out of memory'] + [''] * (7 + len(COUNTS))
    time = f'{row["time"]:.3f} ({min(row["ratios"]):.3f} to {max(row["ratios"]):.3f})' if 'time' in row else ''
    shares = [f'{row["shares"][count]:.2f}' if count in row['shares'] else '' for count in COUNTS]
    return [f'{row["parameters"] / 1e6:.2f}', f'{row["flops"] / 1e9:.2f}', f'{row["calls"]:.0f}',
            f'{row["calls"] / base["calls"]:.2f}' if 'calls' in base else '', f'{row["saved"] / 1e6:.1f}',
            f'{row["peak"] / 1e6:.1f}', f'{row["peak"] / base["peak"]:.3f}' if 'peak' in base else '', time, *shares]


def page(results: dict) -> str:
    """All of it as Markdown."""
    clock, peak = (('time', 'torch.cuda.max_memory_allocated less what was allocated before the step')
                   if results['cuda'] else
                   ('CPU time', 'the highest sum of allocations less releases in torch.profiler\'s record of the CPU '
                    'allocator; at these sizes most of it are the gradients of the weights'))
    lines = ['# What a training step costs', '',
             *(f'Made by `{command}`.' for command in results['commands']),
             f'torch {results["torch"]}, {results["device"]}. All variants in one process, taking turns for '
             f'{results["rounds"]} rounds; time is the ratio of {clock} to the plain baseline\'s over all rounds, in '
             'brackets the range of the rounds\'.', '',
             'A step is forward, loss, backward, SGD with momentum at a learning rate of 0, and zero_grad. A '
             'backbone\'s loss is a fixed random projection of its maps; a detector\'s images, boxes and masks are '
             'random. Its proposals are its anchors, so that all variants work on the same regions, and on images '
             'below 800×1333 it samples fewer of them, in proportion. Under autocast RoIAlign and the losses run in '
             'float32. All variants are about the same blocks, those that `EveryKth` replaces, and have the same '
             'weights.', '',
             'Replaced blocks learn in one of eight steps unless their name says otherwise: FLOPs and calls are the '
             'mean over eight steps, saved bytes and peak are of a step in which one block learns, times of eight. '
             'Calls are tensor operations that compute something; on a GPU each is at least one kernel.', '',
             'FLOPs by torch.utils.flop_counter with corrected formulas (`rl_mmdet.analysis.count_flops`). Saved bytes '
             'are those of distinct storages kept for backward, without parameters and buffers. Peak memory is what a '
             f'step needs beyond the model, its momentum and the batch: {peak}. Share: (baseline − ours) / (baseline − '
             'skip); of a variant with +fold: (folded − ours) / (folded − skip+fold).', '']
    return '\n'.join([*lines, *(line for found in results['cases'] for line in table(found))]).rstrip() + '\n'


def processor() -> str:
    lines = Path('/proc/cpuinfo').read_text().splitlines() if sys.platform == 'linux' else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor()


def environment(args: argparse.Namespace) -> dict[str, Any]:
    cuda = args.device == 'cuda'
    threads = torch.get_num_threads()
    cpu = f'{threads} thread{"s" if threads > 1 else ""} of {processor()}'
    return dict(torch=torch.__version__, cuda=cuda, device=torch.cuda.get_device_name() if cuda else cpu,
                rounds=args.rounds)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', nargs='+', help='config files, or mmdet::PATH for mmdet\'s own')
    parser.add_argument('--preset', choices=PRESETS, help='a list of cases in place of --config; by default that for '
                        'the device. Other options then change all of its cases')
    parser.add_argument('--variants', nargs='+', metavar='NAME', help='all by default; the baseline is always there')
    part = parser.add_mutually_exclusive_group()
    part.add_argument('--backbone-only', action='store_const', dest='part', const='backbone')
    part.add_argument('--detector', action='store_const', dest='part', const='detector', help='both by default')
    parser.add_argument('--size', nargs=2, type=positive, metavar=('H', 'W'))
    parser.add_argument('--batch', nargs='+', type=positive)
    parser.add_argument('--amp', choices=AMP)
    parser.add_argument('--channels-last', action='store_true', default=None)
    parser.add_argument('--count-only', action='store_true', default=None, help='no times, one model at a time')
    parser.add_argument('--k', type=positive, help='every k-th block, 2 by default')
    parser.add_argument('--rounds', type=positive, default=8)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--resume', action='store_true', help='go on with what OUT.json has of the same machine')
    parser.add_argument('--out', type=Path, help='the page and its data, without suffix (default: train_step, on a GPU '
                        'train_step_gpu, in docs/results)')
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: Parser, args: argparse.Namespace) -> None:
    """Find mistakes before anything is built or written."""
    wrong = [name for name in args.variants or [] if name not in NAMES]
    if wrong:
        parser.error(f'--variants: unknown {wrong[0]!r}; allowed: {", ".join(NAMES)}')
    if args.config and args.preset:
        parser.error('--preset and --config both say what to measure; leave one out')
    if args.k == 1:
        parser.error('--k 1: allowed: integers of at least 2 (2 is every other block)')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU here; allowed: cpu')
    for config in args.config or []:
        reason = read_model(config)[1]
        if reason:
            parser.error(f'--config {config}: {reason}; allowed: a detector\'s config file, or mmdet::PATH below '
                         'mmdet\'s folder of configs, such as ' + MASK_R50)
    args.preset = args.preset or ('gpu' if args.device == 'cuda' else 'cpu')
    args.out = args.out or ROOT / 'docs/results' / ('train_step_gpu' if args.device == 'cuda' else 'train_step')


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What is to be measured."""
    big = args.device == 'cuda'
    cases = PRESETS[args.preset]
    if args.config:
        parts = [args.part] if args.part else ['backbone', 'detector']
        cases = [Case(config, part, FULL_SIZE if big else SMALL, batch) for config, part, batch
                 in product(args.config, parts, args.batch or [2 if big else 1])]
    changes = {name: getattr(args, name) for name in ('part', 'amp', 'channels_last', 'count_only', 'k')}
    changes |= dict(size=args.size and tuple(args.size), variants=args.variants and ordered(args.variants))
    changes = {name: value for name, value in changes.items() if value is not None}
    batches = [dict(batch=batch) for batch in args.batch or []] or [{}]
    return list(dict.fromkeys(replace(case, **changes, **batch) for batch in batches for case in cases))


def ordered(names: Sequence[str]) -> tuple[str, ...]:
    """The baseline first, nothing twice."""
    return tuple(dict.fromkeys(['baseline', *names]))


def start(args: argparse.Namespace) -> dict[str, Any]:
    """The results to add to."""
    command = shlex.join(['python', *sys.argv])
    file = args.out.with_suffix('.json')
    results = environment(args) | dict(commands=[command], cases=[])
    if args.resume and file.exists():
        old = json.loads(file.read_text())
        if all(old[key] == results[key] for key in ('torch', 'device', 'rounds')):
            results['cases'] = old['cases']
            results['commands'] = list(dict.fromkeys([*old['commands'], command]))
    return results


def main() -> None:
    args = parse()
    os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # else the profiler complains about a GPU that isn't there
    results = start(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [found['case'] for found in results['cases']]
    for case in cases_of(args):
        if json.loads(json.dumps(asdict(case))) in done:
            continue
        print(case, flush=True)
        begin = time.monotonic()
        results['cases'].append(measure_case(case, args.device, args.rounds))
        clear(args.device)
        args.out.with_suffix('.json').write_text(json.dumps(results, indent=1) + '\n')
        args.out.with_suffix('.md').write_text(page(results))
        print(f'  {time.monotonic() - begin:.0f} s', flush=True)
    print(args.out.with_suffix('.md'))


if __name__ == '__main__':
    main()
