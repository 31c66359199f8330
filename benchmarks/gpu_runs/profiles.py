"""Part C: of which kernels and host calls a training step consists, and what folding and making weights take of it."""
import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from rl_mmdet.replacement import set_step_
from rl_mmdet.replacement.computing_layer import ComputingLayer
from step_variants import Case, Subject, backbone_of, chosen_blocks
from training_step import TrainingStep, backbone_step

from .common import Clock, cells, clear, environment, head, heading, milliseconds, synchronise, why, write
from .variants import build

PROFILED = {'baseline': None, 'folded': None, 'every-8, no block learns': False, 'every-8, all blocks learn': True,
            'every-8+fold': None, 'slim+fold': None}
"""Whether all replaced blocks learn in the step or none; None: one in eight, as in a training."""
MAKING = 'making the weights of a replaced block'
TOP, REPEATS, SMALL_REPEATS = 25, 8, 2


def run_profile(args: argparse.Namespace, clock: Clock, case: Case) -> list[str]:
    """Profile one step of some variants of a case; returns what to print at the end."""
    case = replace(case, variants=tuple(PROFILED))
    found: dict[str, Any] = dict(environment=environment(args), title=str(case), rows={}, failed={})
    subjects: dict[str, Subject] = {}
    with clock.stopping():
        try:
            choice, blocks = chosen_blocks(case)
            for title, learns in PROFILED.items():
                name = title.partition(',')[0]
                try:
                    if name not in subjects:
                        source = subjects['baseline'].step.model if 'baseline' in subjects else None
                        subjects[name] = build(case, name, choice, blocks, args.device, source)
                    found['rows'][title] = _profile(subjects[name], learns, case, args)
                except TimeoutError:
                    raise
                except Exception as error:  # models raise whatever they like
                    found['failed'][title] = why(error)
                clear(args.device)
                write(args, 'gpu_profile', found, _page(found))
        except TimeoutError:
            rest = [title for title in PROFILED if title not in found['rows'] | found['failed']]
            found['failed'] |= dict.fromkeys(rest, 'no time')
    write(args, 'gpu_profile', found, _page(found))
    return [f'C: {found["title"]}', *(f'  {name:26} {_summary(row)}' for name, row in found['rows'].items()),
            *(f'  {name}: {reason}' for name, reason in found['failed'].items())]


def _profile(subject: Subject, learns: bool | None, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """One variant's row."""
    step, device, repeats = subject.step, args.device, SMALL_REPEATS if args.small else REPEATS

    def run() -> None:
        if learns is None:
            step()
        else:
            _say_who_learns(step, learns)
            step.forward_backward()
            step.scaler.step(step.optimizer)
            step.scaler.update()
            step.optimizer.zero_grad()

    for _ in range(2):
        run()
    times, host = milliseconds(run, device, repeats)
    backbone = backbone_step(backbone_of(step.model), case.size, case.batch, step.amp)
    _say_who_learns(backbone, bool(learns))
    parts = _backbone_times(backbone, device, repeats)
    backbone.gradients = None
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == 'cuda' else [])
    with _marked_making(), profile(activities=activities) as record:
        run()
        synchronise(device)
    return dict(step=statistics.median(times), host=host, **parts, **_tables(record))


def _say_who_learns(step: TrainingStep, learns: bool) -> None:
    """All replaced blocks learn in the next run, or none."""
    set_step_(step.model, 0 if learns else 1, staggered=False)


def _backbone_times(step: TrainingStep, device: str, repeats: int) -> dict[str, float]:
    """Of the backbone alone, its forward run and both."""
    def both() -> None:
        step.forward_backward()
        step.optimizer.zero_grad()

    both()
    return dict(forward=statistics.median(milliseconds(step.forward, device, repeats)[0]),
                forward_backward=statistics.median(milliseconds(both, device, repeats)[0]))


def _marked_making() -> Any:
    """Lets the profiler see when a replaced block's weights are made."""
    make = ComputingLayer.weights

    @wraps(make)
    def marked(layer: ComputingLayer, *args: Any, **kwargs: Any) -> Any:
        with record_function(MAKING):
            return make(layer, *args, **kwargs)

    return patch.object(ComputingLayer, 'weights', marked)


def own_functions() -> set[str]:
    """Names, as the profiler gives them, of this project's autograd functions: folding is one of them."""
    classes = [each for each in _subclasses(torch.autograd.Function) if each.__module__.startswith('rl_mmdet.')]
    return {MAKING} | {each.__name__ + end for each in classes for end in ('', 'Backward')}


def _subclasses(cls: type) -> Iterator[type]:
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


def _tables(record: profile) -> dict[str, Any]:
    averages = record.key_averages()
    host = [each for each in averages if each.device_type == DeviceType.CPU]
    marks = {each.key for each in host}  # what the profiler shows as running on the GPU under a host call's name
    shown = [each for each in averages if each.device_type == DeviceType.CUDA and each.key not in marks]
    copies = [each for each in shown if each.key.startswith(('Memcpy', 'Memset'))]
    kernels = [each for each in shown if each not in copies]
    own = own_functions()
    return dict(
        kernels=_top(kernels, lambda each: each.self_device_time_total), calls=_top(host, _host_time),
        copies=_top(copies, lambda each: each.self_device_time_total),
        kernel_count=sum(each.count for each in kernels), kernel_ms=_total(kernels), copy_ms=_total(copies),
        own=[[each.key, each.count, each.cpu_time_total / 1e3, each.device_time_total / 1e3]
             for each in sorted(host, key=lambda each: -each.cpu_time_total) if each.key in own])


def _host_time(event: Any) -> float:
    return event.self_cpu_time_total


def _total(events: list) -> float:
    """Milliseconds on the GPU."""
    return sum(event.self_device_time_total for event in events) / 1e3


def _top(events: list, time: Callable[[Any], float]) -> list[list]:
    """Name, number and milliseconds of those that take longest."""
    return [[event.key[:140], event.count, time(event) / 1e3] for event in sorted(events, key=time)[:-TOP - 1:-1]]


def _summary(row: dict[str, Any]) -> str:
    return (f'step {row["step"]:.1f} ms, kernels {row["kernel_ms"]:.1f} ms ({row["kernel_count"]}), backbone '
            f'{row["forward"]:.1f} + {row["forward_backward"] - row["forward"]:.1f} ms')


def _page(found: dict[str, Any]) -> list[str]:
    page = heading('Where a training step spends its time', found)
    page += [f'{found["title"]}. Milliseconds. The step, how long the host is busy with it, '
             'and the backbone alone are timed without the profiler (medians of eight); kernels, copies and calls are '
             'of one step under torch.profiler, which slows the host down. Busy is the kernels\' share of the step. '
             'Replaced blocks learn in one of eight steps, in turns, unless said otherwise; of the backbone alone, '
             'none learns then.', '']
    page += head('variant', 'step', 'host', 'kernels', 'kernels run', 'busy', 'copies run', 'backbone forward',
                 'backbone backward')
    page += [cells(name, f'{row["step"]:.1f}', f'{row["host"]:.1f}', row['kernel_count'], f'{row["kernel_ms"]:.1f}',
                   f'{row["kernel_ms"] / row["step"]:.0%}', f'{row["copy_ms"]:.1f}', f'{row["forward"]:.1f}',
                   f'{row["forward_backward"] - row["forward"]:.1f}') for name, row in found['rows'].items()] + ['']
    page += [f'- not profiled: {name}: {reason}' for name, reason in found['failed'].items()]
    for name, row in found['rows'].items():
        page += ['', f'## {name}', '']
        if row['own']:
            page += head('folding and making weights, all that it calls included', 'number', 'host, ms', 'GPU, ms')
            page += [cells(f'`{key}`', count, f'{host:.2f}', f'{gpu:.2f}') for key, count, host, gpu in row['own']]
            page.append('')
        for title in ('kernels', 'copies', 'calls'):
            if row[title]:
                page += head({'calls': 'host calls, without what they call'}.get(title, title), 'number', 'ms')
                page += [cells(f'`{key}`', count, f'{ms:.2f}') for key, count, ms in row[title]] + ['']
    return page
