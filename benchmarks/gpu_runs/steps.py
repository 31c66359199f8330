"""Part B: time, peak memory and kernels of a training step with every way of replacing blocks."""
import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rl_mmdet.analysis import count_flops, saved_bytes, trainable_parameters
from rl_mmdet.replacement import set_step_
from step_variants import Case, Subject, chosen_blocks
from training_step import TrainingStep, counted_regions

from .common import Clock, clear, environment, milliseconds, synchronise, why, write
from .steps_page import goal_lines, page, table_lines
from .variants import build, cases_of, context_of

PER_ROUND, SMALL_ROUND = 8, 2
"""Steps in a row: each replaced block learns once in eight; in a rehearsal fewer."""
FEWEST_ROUNDS = 2
FIRST_SHARE, SHARE = .6, .5
"""Of the time left, what the first case and the others may take."""
Row = dict[str, Any]


def run_steps(args: argparse.Namespace, clock: Clock) -> list[str]:
    """Measure case after case; returns what to print at the end."""
    cases = cases_of(args.small)[:args.cases]
    planned = [case for case in cases if 'compiled' not in case.variants or args.part[-1] == 'B']
    now = environment(args)
    found: Row = _measured_before(args, now) or dict(environment=now, rates=_rates(args.device), rounds=args.rounds,
                                                     cases=[])
    there = {_key(case): _is_complete(case) for case in found['cases']}
    planned = [case for case in planned if not there.get((str(case), case.variants))]
    found['not_run'] = [str(case) for case in cases if (str(case), case.variants) not in there]
    clear(args.device)
    for number, case in enumerate(planned):
        if clock.left() < args.least_seconds:
            break
        print(case, flush=True)
        begin = time.monotonic()
        mine: Row = dict(title=str(case), case=asdict(case), rows={}, left_out={}, regions={})
        _put(mine, found['cases'], cases_of(args.small))
        if _key(mine) not in there:
            found['not_run'].remove(str(case))

        def save() -> None:
            write(args, 'gpu_train_step', found, page(found))

        last = number == len(planned) - 1
        part = clock.part(1. if last else FIRST_SHARE if number == 0 else SHARE)
        try:
            with part.stopping():
                _Measurement(case, args, part, mine, save).run()
        except Exception as error:  # models raise whatever they like
            mine['left_out']['the rest'] = why(error)
        add_ratios_(mine['rows'])
        clear(args.device)
        mine['seconds'] = time.monotonic() - begin
        save()
        print(*table_lines(mine), f'  {mine["seconds"]:.0f} s', sep='\n', flush=True)
    write(args, 'gpu_train_step', found, page(found))
    return ['B: ' + (found['cases'][0]['title'] if found['cases'] else 'no time'), *goal_lines(found),
            *(['  no time for: ' + '; '.join(found['not_run'])] if found['not_run'] else [])]


def _key(case: Row) -> tuple[str, tuple[str, ...]]:
    """What tells a measured case from the others: some differ in their variants alone."""
    return case['title'], tuple(case['case']['variants'])


def _is_complete(case: Row) -> bool:
    return not case['left_out'] and all('flops' in row for row in case['rows'].values())


def _put(case: Row, among: list[Row], order: Sequence[Case]) -> None:
    """Put a case in its place, and in that of an earlier one of its key."""
    places = {(str(each), each.variants): number for number, each in enumerate(order)}
    among[:] = sorted([case, *(each for each in among if _key(each) != _key(case))],
                      key=lambda each: places.get(_key(each), len(places)))


def _measured_before(args: argparse.Namespace, now: Row) -> Row | None:
    """With ``--resume`` what OUT has, which must be of the same card and packages."""
    file = args.out / 'gpu_train_step.json'
    if not args.resume or not file.is_file():
        return None
    found = json.loads(file.read_text())
    before = found['environment']
    for key in ('device', 'torch', 'cuda', 'versions'):
        if before[key] != now[key]:
            raise SystemExit(f'error: --resume: {file} is of another {key}: {before[key]}, not {now[key]}; leave '
                             '--resume out, or give another --out')
    return found | dict(environment=now | dict(commands=before['commands'] + now['commands']))


def _rates(device: str) -> dict[str, float]:
    """What the card reaches: FLOP/s of a bfloat16 matrix product, bytes/s of a copy (read and written)."""
    size, length = (8192, 2 ** 30) if device == 'cuda' else (256, 2 ** 20)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    memory = torch.empty(length, dtype=torch.uint8, device=device)
    other = torch.empty_like(memory)
    product, copy = (statistics.median(milliseconds(work, device, 10)[0][3:]) / 1e3
                     for work in (lambda: left @ right, lambda: other.copy_(memory)))
    return dict(flops=2 * size ** 3 / product, bytes=2 * length / copy, size=size)


class _Measurement:
    """The variants of one case, all on the card at a time; they share the weights."""

    def __init__(self, case: Case, args: argparse.Namespace, clock: Clock, found: Row,
                 save: Callable[[], None]) -> None:
        self.case, self.device, self.clock, self.save = case, args.device, clock, save
        self.rounds, self.steps = args.rounds, SMALL_ROUND if args.small else PER_ROUND
        self.rows, self.left_out, self.found = found['rows'], found['left_out'], found
        self.subjects: dict[str, Subject] = {}
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        self.build_all()
        self.take_turns()
        for what in (self.counts,) if self.device == 'cpu' else (self.kernels, self.counts):
            for name in list(self.subjects):
                if self.clock.left() < 2 * self.steps * self.seconds.get(name, 0.):
                    return
                self.tried(name, lambda name=name, what=what: self.rows[name].update(what(self.subjects[name])))
            self.save()

    def tried(self, name: str, work: Callable[[], object]) -> bool:
        """Do some work for a variant; if it fails, the reason is noted and the variant is not looked at again."""
        try:
            with context_of(name):
                work()
            return True
        except Exception as error:  # models raise whatever they like
            self.left_out[name] = why(error)
            self.subjects.pop(name, None)
            clear(self.device)
            if isinstance(error, TimeoutError):
                raise
        return False

    def build_all(self) -> None:
        """As many variants as leave half of the time for measuring them, at least the first six."""
        choice, blocks = chosen_blocks(self.case)
        begin, whole = time.monotonic(), self.clock.left()
        for number, name in enumerate(self.case.variants):
            if number >= 6 and time.monotonic() - begin + self.round_seconds() * FEWEST_ROUNDS > 0.8 * whole:
                self.left_out[name] = 'no time'
            elif self.tried(name, lambda name=name: self.add(name, choice, blocks)):
                self.save()

    def add(self, name: str, choice: dict, blocks: list[str]) -> None:
        """Build one and let it do its first steps, in which libraries are loaded and momentum is made."""
        source = next(iter(self.subjects.values())).step.model if self.subjects else None
        subject = build(self.case, name, choice, blocks, self.device, source)
        if source is None:
            with counted_regions(subject.step.model) as regions:
                subject.step()
            self.found['regions'] = dict(regions)
        else:
            subject.step()
        synchronise(self.device)
        begin = time.monotonic()
        subject.step()
        synchronise(self.device)
        self.seconds[name] = time.monotonic() - begin
        self.subjects[name] = subject
        self.rows[name] = dict(parameters=trainable_parameters(subject.step.model), own=_own_bytes(subject.step),
                               times=[], host=[])
        clear(self.device)

    def round_seconds(self) -> float:
        return self.steps * sum(self.seconds[name] for name in self.subjects)

    def take_turns(self) -> None:
        """Times and peaks, round by round."""
        for number in range(self.rounds):
            if number >= FEWEST_ROUNDS and self.clock.left() < 2 * self.round_seconds():
                break
            for name in list(self.subjects):
                if self.clock.left() > 1.2 * self.steps * self.seconds[name]:
                    self.tried(name, lambda name=name: self.one_turn(name))
            add_ratios_(self.rows)
            self.save()
        self.left_out.update({name: 'no time for its steps' for name in self.subjects if not self.rows[name]['times']})

    def one_turn(self, name: str) -> None:
        row, step = self.rows[name], self.subjects[name].step
        before = _forget_peak(self.device)
        times, host = milliseconds(step, self.device, self.steps)
        row['times'].append(times)
        row['host'].append(host)
        if self.device == 'cuda':
            row['step_peak'] = max(row.get('step_peak', 0), torch.cuda.max_memory_allocated() - before)
            row['peak'] = row['own'] + row['step_peak']

    def kernels(self, subject: Subject) -> Row:
        """Number of kernels of one step, the milliseconds in which they and the copies run."""
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            subject.step()
            torch.cuda.synchronize()
        events = [event for event in record.profiler.kineto_results.events()
                  if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()]
        copies = [event for event in events if event.name().startswith('Mem')]
        kernel_count = len(events) - len(copies)
        copied, busy = (sum(event.duration_ns() for event in part) / 1e6 for part in (copies, events))
        return dict(kernels=kernel_count, busy=busy - copied, copies=copied)

    def counts(self, subject: Subject) -> Row:
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


def _own_bytes(step: TrainingStep) -> int:
    """Bytes of a model's parameters and buffers, and of SGD's momentum."""
    tensors = [*step.model.parameters(), *step.model.buffers()]
    learned = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *learned])


def _forget_peak(device: str) -> int:
    """Begin to look for a new peak; returns what is allocated now."""
    if device == 'cpu':
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def add_ratios_(rows: dict[str, Row]) -> None:
    """Medians over all steps, and the ratios to the baseline's, round by round."""
    base = rows.get('baseline', {})
    for row in rows.values():
        if not row['times']:
            continue
        row['ms'] = statistics.median(each for times in row['times'] for each in times)
        row['host_ms'] = statistics.median(row['host'])
        if base.get('times'):
            row['ratios'] = [statistics.median(own) / statistics.median(theirs)
                             for own, theirs in zip(row['times'], base['times'], strict=False)]
            row['time'] = statistics.median(row['ratios'])
        for key, ratio in (('peak', 'peak_ratio'), ('busy', 'busy_ratio')):
            if key in row and base.get(key):
                row[ratio] = row[key] / base[key]
