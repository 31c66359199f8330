"""What has to be seen on a GPU, in a few minutes: correct, time and memory of a training step, where the time goes.

    python benchmarks/gpu.py --part A B C --out docs/results --minutes 5.5
    python benchmarks/gpu.py --part B C --out /tmp/rehearsal --device cpu --small

A   the tests marked gpu, by pytest                                             -> OUT/gpu_checks.md and .json
B   step time, peak memory and kernels of detectors with every way of replacing -> OUT/gpu_train_step.md and .json
C   which kernels and calls a step consists of                                  -> OUT/gpu_profile.md and .json

The most important rows come first; results are written after every one. Nothing is begun that can't end in time.
"""
import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

import train_step
from rl_mmdet.analysis import count_flops, saved_bytes, trainable_parameters
from rl_mmdet.folding import fold_norm
from rl_mmdet.replacement import set_step_
from train_step import MASK_R50, MASK_R101, RETINA_R50, SWIN_T, VIT_B, Case, Subject, chosen_blocks, clear

ROOT = Path(__file__).resolve().parents[1]
GOALS = {'folded': (.85, .70), 'slim+fold': (.65, .50), 'every-8+fold': (.80, .70), 'recompute+fold': (.90, .55)}
"""Mask R-CNN R-101, the whole step against the plain baseline: time and peak memory."""
ALL = ('baseline', 'folded', 'every-8+fold', 'slim+fold', 'recompute+fold', 'skip+fold', 'every-8', 'slim', 'skip',
       'frozen', 'checkpoint', 'efficient', 'folded-alone')
MAIN = ('baseline', 'folded', 'every-8+fold', 'slim+fold', 'recompute+fold', 'skip+fold')
PLAIN = ('baseline', 'every-8', 'slim', 'skip')  # models without BatchNorm
FULL = (800, 1333)
CASES = (
    Case(MASK_R101, 'detector', FULL, 2, 'bf16', variants=ALL),
    Case(MASK_R101, 'detector', FULL, 8, 'bf16', variants=MAIN),
    Case(MASK_R101, 'detector', FULL, 2, 'bf16', channels_last=True, variants=MAIN),
    Case(MASK_R50, 'detector', FULL, 2, 'bf16', variants=MAIN),
    Case(SWIN_T, 'detector', FULL, 2, 'bf16', variants=PLAIN),
    Case(VIT_B, 'detector', (1024, 1024), 2, 'bf16', variants=PLAIN),
    Case(RETINA_R50, 'detector', FULL, 2, 'bf16', variants=MAIN),
    Case(MASK_R101, 'detector', FULL, 2, 'fp16', variants=MAIN),
    Case(MASK_R50, 'detector', FULL, 2, 'bf16', variants=('baseline', 'compiled')),
)
SMALL_CASES = tuple(Case(config, 'detector', (96, 96), 1, 'bf16', variants=variants)
                    for config, variants in ((MASK_R50, ALL), (SWIN_T, PLAIN)))
PROFILED = ('baseline', 'folded', 'every-8', 'every-8+fold', 'slim+fold')
ROUNDS, PER_ROUND = 5, 8
LEFT_OVER = 4.
"""Seconds at the end in which nothing is begun."""


class Clock:
    """How much of the time that was given is left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self.end - time.monotonic() - LEFT_OVER


def synchronise(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def environment(args: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if args.device == 'cuda' else platform.processor() or 'a CPU'
    return dict(device=name, torch=torch.__version__, cuda=torch.version.cuda, cores=os.cpu_count(),
                date=datetime.date.today().isoformat(), command=shlex.join(['python', *sys.argv]))


def heading(title: str, found: dict[str, Any]) -> list[str]:
    about = found['environment']
    return [f'# {title}', '', f'Made by `{about["command"]}` on {about["device"]}, {about["cores"]} cores, torch '
            f'{about["torch"]}, CUDA {about["cuda"]}, {about["date"]}.', '']


def write(args: argparse.Namespace, name: str, found: dict[str, Any], page: list[str]) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f'{name}.json').write_text(json.dumps(found, indent=1) + '\n')
    (args.out / f'{name}.md').write_text('\n'.join(page).rstrip() + '\n')


def cells(*values: Any) -> str:
    return '| ' + ' | '.join(map(str, values)) + ' |'


# A: correct

RESULT = re.compile(r'(PASSED|FAILED|SKIPPED|ERROR)\s+(tests/\S+::.*)|(tests/\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b')


def run_checks(args: argparse.Namespace, clock: Clock) -> None:
    """The tests marked gpu, as far as they come in time."""
    spread = ['-n', str(args.jobs), '--dist', 'worksteal'] if args.jobs > 1 else ['-p', 'no:xdist']
    command = [sys.executable, '-m', 'pytest', '-v', '-rfEs', '-p', 'no:cacheprovider', '-m', 'gpu', '--tb=short',
               *spread, 'tests/gpu', *shlex.split(args.pytest)]
    limit, began = max(20., min(clock.left(), args.checks_minutes * 60)), time.monotonic()
    environ = dict(os.environ) | (dict(RL_MMDET_TEST_DEVICE='cpu') if args.device == 'cpu' else {})
    log = args.out / 'gpu_checks.log'
    args.out.mkdir(parents=True, exist_ok=True)
    with log.open('w') as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environ,
                                   start_new_session=True)
        try:
            process.wait(limit)
            ended = True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            ended = False
    text = log.read_text()
    results = {(before or after).strip().split(' - ')[0]: first or second
               for first, before, after, second in RESULT.findall(text.partition('short test summary')[0])}
    reasons = dict(re.findall(r'^(?:FAILED|ERROR) (\S+?)(?: - (.*))?$', text, re.M))
    found = dict(environment=environment(args), seconds=time.monotonic() - began, ended=ended, results=results,
                 reasons=reasons, tail=text[-6000:])
    counts = {kind: sum(result == kind for result in results.values()) for kind in sorted(set(results.values()))}
    page = heading('Checks on a GPU', found)
    page += [', '.join(f'{count} {kind.lower()}' for kind, count in counts.items())
             + f' in {found["seconds"]:.0f} s' + ('.' if ended else '; stopped there, so some tests did not run.'), '']
    page += [cells('test', 'result', 'reason'), '|---|---|---|']
    page += [cells(f'`{name}`', result.lower(), reasons.get(name, '')) for name, result in sorted(results.items())]
    write(args, 'gpu_checks', found, page)
    print(page[4], *[f'  {name}: {reason}' for name, reason in reasons.items()], sep='\n', flush=True)


# B: time and memory

def build(case: Case, name: str, choice: dict, blocks: list[str], device: str, source: nn.Module | None) -> Subject:
    """A variant of :mod:`train_step`, or one of three that exist only here."""
    known = {'efficient': 'baseline', 'compiled': 'baseline', 'folded-alone': 'folded'}.get(name, name)
    subject = Subject(case, known, choice, blocks, device, source)
    backbone = train_step.backbone_of(subject.step.model)
    if name == 'efficient':
        turn_on_efficient_conv_bn_eval_for_single_model(backbone)
    if name == 'compiled':
        backbone.forward = torch.compile(backbone.forward)
    return subject


def context_of(name: str) -> Any:
    """What a variant runs in: ``folded-alone`` folds every convolution by itself."""
    return patch.object(fold_norm, 'WEIGHTS', 0) if name == 'folded-alone' else nullcontext()


def own_bytes(step: Any) -> int:
    """Bytes of a model's parameters and buffers, and of SGD's momentum."""
    tensors = [*step.model.parameters(), *step.model.buffers()]
    learned = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *learned])


def peak_of(step: Callable[[], None], device: str) -> int:
    """Bytes at the peak of eight steps beyond what was there before."""
    if device == 'cpu':
        return 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(PER_ROUND):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def milliseconds(step: Callable[[], None], device: str, count: int) -> list[float]:
    """Of each of some steps in a row, from the GPU's events."""
    if device == 'cpu':
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in zip(marks, marks[1:], strict=False)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in zip(events, events[1:], strict=False)]


def kernels_of(step: Callable[[], None], device: str) -> dict[str, float]:
    """Number of kernels of one step, and the milliseconds in which they ran."""
    if device == 'cpu':
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    events = [event for event in record.profiler.kineto_results.events()
              if event.device_type() == torch.autograd.DeviceType.CUDA and not event.name().startswith(('Mem', 'gpu_'))]
    return dict(kernels=len(events), busy=sum(event.duration_ns() for event in events) / 1e6)


def counts_of(subject: Subject) -> dict[str, float]:
    """FLOPs of a step and bytes saved for backward, in a step in which one block in eight learns."""
    step = subject.step
    set_step_(step.model, 0)
    outputs: list[torch.Tensor] = []
    saved = saved_bytes(step.model, lambda: outputs.extend(step.forward()), subject.checkpointed)
    outputs.clear()
    set_step_(step.model, 0)
    flops = count_flops(step.forward_backward)
    step.optimizer.zero_grad()
    return dict(flops=flops, saved=saved)


def measure(case: Case, args: argparse.Namespace, clock: Clock, save: Callable[[dict], None]) -> dict[str, Any]:
    """Times of a case's variants in turn, their peaks, then kernels and counts as far as there is time."""
    found: dict[str, Any] = dict(title=str(case), case=asdict(case), rows={}, left_out={})
    choice, blocks = chosen_blocks(case)
    subjects: dict[str, Subject] = {}
    for name in case.variants:
        if clock.left() < 15:
            found['left_out'][name] = 'no time'
            continue
        source = next(iter(subjects.values())).step.model if subjects else None
        try:
            with context_of(name):
                subject = build(case, name, choice, blocks, args.device, source)
                for _ in range(2):
                    subject.step()
                peak = peak_of(subject.step, args.device)
        except Exception as error:  # models raise whatever they like
            found['left_out'][name] = f'{type(error).__name__}: {train_step.brief(error)}'[:200]
            print(f'  {name}: {found["left_out"][name]}', flush=True)
            clear(args.device)
            continue
        subjects[name] = subject
        found['rows'][name] = dict(parameters=trainable_parameters(subject.step.model), times=[],
                                   peak=peak + own_bytes(subject.step), activations=peak)
        clear(args.device)
    for _ in range(args.rounds):
        began = time.monotonic()
        for name, subject in subjects.items():
            with context_of(name):
                found['rows'][name]['times'].append(milliseconds(subject.step, args.device, PER_ROUND))
        if clock.left() < 1.5 * (time.monotonic() - began):
            break
    add_ratios_(found['rows'])
    save(found)
    for what in (lambda subject: kernels_of(subject.step, args.device), counts_of):
        for name, subject in subjects.items():
            if clock.left() < 10:
                break
            try:
                with context_of(name):
                    found['rows'][name].update(what(subject))
            except Exception as error:
                found['rows'][name]['uncounted'] = train_step.brief(error)[:200]
        save(found)
    return found


def add_ratios_(rows: dict[str, dict]) -> None:
    base = rows.get('baseline')
    for row in rows.values():
        row['ms'] = statistics.median(each for times in row['times'] for each in times)
        if base:
            row['ratios'] = [statistics.median(own) / statistics.median(theirs)
                             for own, theirs in zip(row['times'], base['times'], strict=False)]
            row['time'] = statistics.median(row['ratios'])
            row['peak_ratio'] = row['peak'] / base['peak']


def rates(device: str) -> dict[str, float]:
    """What the card reaches: FLOP/s of a bfloat16 matrix product, bytes/s of a copy (read and written)."""
    size = 8192 if device == 'cuda' else 512
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    memory = torch.empty(2 ** 30 if device == 'cuda' else 2 ** 20, dtype=torch.uint8, device=device)
    other = torch.empty_like(memory)
    product, copy = (statistics.median(milliseconds(work, device, 10)[3:]) / 1e3
                     for work in (lambda: left @ right, lambda: other.copy_(memory)))
    return dict(flops=2 * size ** 3 / product, bytes=2 * memory.numel() / copy)


def step_page(found: dict[str, Any]) -> list[str]:
    rate = found['rates']
    page = heading('A training step on a GPU', found)
    page += [f'Measured on the card: {rate["flops"] / 1e12:.0f} TFLOP/s (bfloat16 matrix product of 8192³), '
             f'{rate["bytes"] / 1e12:.2f} TB/s (copy, read and written).', '',
             'A step is forward, loss, backward, SGD with momentum at a rate of 0, on random images, boxes and masks, '
             'the same regions for all variants, without a loss scale. Time: median of CUDA events; all variants take '
             'turns in one process, the ratio is the median over rounds, in brackets their range. Peak: parameters, '
             'buffers and momentum of the variant, and what the step allocates at its peak (gradients are among it). '
             'Kernels and the time in which they run are of one step, the rest of its time the card waits for the '
             'host. Floor: the longer of FLOPs over the first rate and twice the bytes saved for backward over the '
             'second. Replaced are every second block, learning in one of eight steps; `+fold` is `fold_norm=True`, '
             'folded-alone the same convolution by convolution, efficient MMEngine\'s efficient_conv_bn_eval.', '']
    first = found['cases'][0] if found['cases'] else dict(rows={})
    if all('time' in first['rows'].get(name, {}) for name in GOALS):
        page += [f'## Goals: {first["title"]}', '', cells('variant', 'time', 'goal', 'peak memory', 'goal'),
                 '|---' * 5 + '|']
        page += [cells(name, f'{row["time"]:.3f}', f'≤ {limit}', f'{row["peak_ratio"]:.3f}', f'≤ {memory}')
                 for name, (limit, memory) in GOALS.items() for row in [first['rows'][name]]] + ['']
    for case in found['cases']:
        page += [f'## {case["title"]}', '',
                 cells('variant', 'ms', 'time, × baseline', 'peak, GB', 'peak, × baseline', 'parameters, M', 'kernels',
                       'kernels run, ms', 'TFLOP', 'saved, GB', 'time / floor'), '|---' * 11 + '|']
        page += [cells(*step_cells(name, row, rate)) for name, row in case['rows'].items() if 'ms' in row] + ['']
        page += [f'- left out: {name}: {reason}' for name, reason in case['left_out'].items()]
        page += [f'- not counted: {name}: {row["uncounted"]}' for name, row in case['rows'].items()
                 if 'uncounted' in row]
        page.append('')
    if found['not_run']:
        page += ['No time was left for: ' + '; '.join(found['not_run']) + '.', '']
    return page


def step_cells(name: str, row: dict, rate: dict) -> list[str]:
    low, high = (min(row['ratios']), max(row['ratios'])) if 'ratios' in row else (0, 0)
    floor = 1e3 * max(row['flops'] / rate['flops'], 2 * row['saved'] / rate['bytes']) if 'flops' in row else 0
    return [name, f'{row["ms"]:.1f}', f'{row["time"]:.3f} ({low:.3f} to {high:.3f})' if 'time' in row else '',
            f'{row["peak"] / 1e9:.2f}', f'{row["peak_ratio"]:.3f}' if 'peak_ratio' in row else '',
            f'{row["parameters"] / 1e6:.2f}', str(row.get('kernels', '')),
            f'{row["busy"]:.1f}' if 'busy' in row else '',
            f'{row["flops"] / 1e12:.2f}' if floor else '', f'{row["saved"] / 1e9:.2f}' if floor else '',
            f'{row["ms"] / floor:.1f}' if floor else '']


def run_steps(args: argparse.Namespace, clock: Clock) -> None:
    cases = SMALL_CASES if args.small else CASES
    cases = cases[:args.cases] if args.cases else cases
    found: dict[str, Any] = dict(environment=environment(args), rates=rates(args.device), cases=[],
                                 not_run=[str(case) for case in cases])
    for number, case in enumerate(cases):
        if clock.left() < args.least_seconds:
            break
        print(case, flush=True)

        def save(part: dict, number: int = number) -> None:
            found['cases'][number:] = [part]
            found['not_run'] = [str(other) for other in cases[number + 1:]]
            write(args, 'gpu_train_step', found, step_page(found))

        began = time.monotonic()
        try:
            save(measure(case, args, clock, save))
        except Exception as error:
            reason = f'{type(error).__name__}: {error}'[:300]
            save(dict(title=str(case), case=asdict(case), rows={}, left_out={'all': reason}))
        clear(args.device)
        for name, row in found['cases'][number]['rows'].items():
            if 'time' in row:
                print(f'  {name:16} {row["ms"]:8.1f} ms  x{row["time"]:.3f}  peak x{row["peak_ratio"]:.3f}  '
                      f'{row.get("kernels", "?")} kernels, {row.get("busy", 0):.1f} ms', flush=True)
        print(f'  left out: {found["cases"][number]["left_out"]}; {time.monotonic() - began:.0f} s', flush=True)


# C: where the time goes

def run_profile(args: argparse.Namespace, clock: Clock) -> None:
    """Kernels and host calls of one step of some variants of the first case."""
    case = replace((SMALL_CASES if args.small else CASES)[0], variants=PROFILED)
    choice, blocks = chosen_blocks(case)
    found: dict[str, Any] = dict(environment=environment(args), title=str(case), rows={})
    source = None
    for name in PROFILED:
        if clock.left() < 15:
            break
        try:
            subject = build(case, name, choice, blocks, args.device, source)
            source = source or subject.step.model
            for _ in range(3):
                subject.step()
            found['rows'][name] = profile_of(subject, args.device)
        except Exception as error:
            found['rows'][name] = dict(failed=f'{type(error).__name__}: {error}'[:300])
        clear(args.device)
        write(args, 'gpu_profile', found, profile_page(found))


def profile_of(subject: Subject, device: str) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == 'cuda' else [])
    step, backbone = subject.step, train_step.backbone_of(subject.step.model)
    with profile(activities=activities) as record:
        step()
        synchronise(device)
    averages = record.key_averages()
    cuda = [each for each in averages if each.device_type == torch.autograd.DeviceType.CUDA]
    host = [each for each in averages if each.device_type == torch.autograd.DeviceType.CPU]
    kernels = sorted(cuda, key=lambda each: -each.self_device_time_total)[:25]
    calls = sorted(host, key=lambda each: -each.self_cpu_time_total)[:25]
    ms = milliseconds(step, device, PER_ROUND)
    return dict(step_ms=statistics.median(ms), backbone_forward_ms=forward_ms(backbone, subject, device),
                kernels=[[each.key[:120], each.count, each.self_device_time_total / 1e3] for each in kernels],
                calls=[[each.key[:120], each.count, each.self_cpu_time_total / 1e3] for each in calls],
                kernel_count=sum(each.count for each in cuda),
                kernel_ms=sum(each.self_device_time_total for each in cuda) / 1e3)


def forward_ms(backbone: nn.Module, subject: Subject, device: str) -> float:
    """Of the backbone alone, with a graph for backward."""
    size, batch = FULL if device == 'cuda' else (96, 96), 2 if device == 'cuda' else 1
    images = torch.rand(batch, 3, *size, device=device)

    def run() -> None:
        with torch.autocast(device, dtype=subject.step.amp, enabled=subject.step.amp is not None):
            backbone(images)

    return statistics.median(milliseconds(run, device, 5))


def profile_page(found: dict[str, Any]) -> list[str]:
    page = heading('Where a training step spends its time', found)
    page += [f'{found["title"]}. Milliseconds of one step under torch.profiler; the step and the backbone\'s forward '
             'run are timed without it.', '']
    for name, row in found['rows'].items():
        page += [f'## {name}', '']
        if 'failed' in row:
            page += [row['failed'], '']
            continue
        page += [f'Step {row["step_ms"]:.1f} ms, backbone forward {row["backbone_forward_ms"]:.1f} ms, '
                 f'{row["kernel_count"]} kernels and copies that run for {row["kernel_ms"]:.1f} ms.', '']
        for title, rows in (('kernel', row['kernels']), ('host call', row['calls'])):
            page += [cells(title, 'number', 'ms'), '|---|---|---|']
            page += [cells(f'`{key.replace("|", "/")}`', count, f'{ms:.2f}') for key, count, ms in rows] + ['']
    return page


PARTS: dict[str, Callable[[argparse.Namespace, Clock], None]] = {'A': run_checks, 'B': run_steps, 'C': run_profile}


def parse() -> argparse.Namespace:
    parser = train_step.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--part', nargs='+', choices=PARTS, required=True)
    parser.add_argument('--out', type=Path, required=True, help='folder of the results')
    parser.add_argument('--minutes', type=float, default=5.5, help='in which all parts end (default: 5.5)')
    parser.add_argument('--checks-minutes', type=float, default=2., help='most of these for part A (default: 2)')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--small', action='store_true', help='tiny images and few cases: a rehearsal')
    parser.add_argument('--rounds', type=train_step.positive, default=ROUNDS)
    parser.add_argument('--cases', type=train_step.positive, help='only the first ones of part B')
    parser.add_argument('--least-seconds', type=float, default=40., help='in which part B begins no other case')
    parser.add_argument('--jobs', type=train_step.positive, default=1, help='processes for part A (pytest-xdist)')
    parser.add_argument('--pytest', default='', help='more arguments for part A, as one text')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU here; allowed: cpu, for a rehearsal with --small')
    return args


def main() -> None:
    args = parse()
    clock = Clock(args.minutes)
    for part in args.part:
        PARTS[part](args, clock)


if __name__ == '__main__':
    main()
