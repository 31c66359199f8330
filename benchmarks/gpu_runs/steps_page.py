"""The page of part B."""
from typing import Any

from training_step import BOXES

from .common import cells, head, heading
from .variants import GOALS

COLUMNS = ('variant', 'ms', 'time, × baseline (range)', 'host, ms', 'kernels', 'kernels run, ms',
           'kernels run, × baseline', 'copies run, ms', 'busy', 'peak, GB', 'peak, × baseline', 'parameters, M',
           'TFLOP', 'saved, GB', 'floor, ms', 'time / floor')
Row = dict[str, Any]


def page(found: Row) -> list[str]:
    """All of it as Markdown."""
    rate = found['rates']
    lines = heading('A training step on a GPU', found)
    if found['cases']:
        lines += _goals(found['cases'][0])
    lines += ['## What the numbers are', '',
              f'The card\'s rates, measured at the start: {rate["flops"] / 1e12:.4g} TFLOP/s (bfloat16 matrix product '
              f'of {rate["size"]}³), {rate["bytes"] / 1e12:.3g} TB/s (copy, read and written).', '',
              *_notes(found['rounds'])]
    for case in found['cases']:
        lines += _case(case, rate)
    if found['not_run']:
        lines += ['Not measured, for lack of time: ' + '; '.join(found['not_run']) + '.', '']
    return lines


def _notes(rounds: int) -> list[str]:
    return [
        f'- A step is forward, loss, backward, SGD with momentum at a rate of 0, and zero_grad, on fixed random images '
        f'with {BOXES} boxes each, and masks where there is a mask head. All variants work on the same regions, and '
        'share the weights that they have in common. fp16 is with a loss scale of 512 (torch\'s GradScaler).',
        f'- ms: median of CUDA events. All variants take turns in one process, eight steps at a time, for at most '
        f'{rounds} rounds; time is the median of the rounds\' ratios, in brackets their range. Host: how long Python '
        'is busy with a step. Where it is about as long as the step, the step is launch-bound: the card waits.',
        '- Kernels and copies, and how long they run, are of one step under torch.profiler. Busy is the kernels\' '
        'share of the step.',
        '- Peak: parameters, buffers and momentum of the variant alone, and what its steps allocate on top at their '
        'peak, with gradients (torch.cuda.max_memory_allocated less what was there before, which belongs to all).',
        '- TFLOP and saved (bytes kept for backward) are of a step in which one block in eight learns. Floor: the '
        'longer of FLOPs over the first rate and twice the saved bytes over the second.',
        '- Every second block is replaced (`EveryKth`), learning in one of eight steps. `+fold` is `fold_norm=True`, '
        'folded-alone the same convolution by convolution, efficient MMEngine\'s efficient_conv_bn_eval, checkpoint '
        'and frozen keep the blocks; skip leaves them out.', '']


def _goals(case: Row) -> list[str]:
    rows = {name: case['rows'].get(name, {}) for name in GOALS}
    lines = [f'## Goals: {case["title"]}', '',
             *head('variant', 'time, × baseline', 'goal', '', 'peak, × baseline', 'goal', '',
                   'kernels run, × baseline')]
    for name, (time, memory) in GOALS.items():
        row = rows[name]
        lines.append(cells(name, *_against(row.get('time'), time), *_against(row.get('peak_ratio'), memory),
                           _number(row, 'busy_ratio', '.3f')))
    return [*lines, '']


def _against(value: float | None, goal: float) -> tuple[str, str, str]:
    """A value, its goal and whether that is met."""
    if value is None:
        return 'not measured', f'≤ {goal:.2f}', ''
    return f'{value:.3f}', f'≤ {goal:.2f}', 'met' if value <= goal else 'missed'


def goal_lines(found: Row) -> list[str]:
    """The table of goals for a terminal."""
    rows = found['cases'][0]['rows'] if found['cases'] else {}
    lines = []
    for name, (time, memory) in GOALS.items():
        row = rows.get(name, {})
        parts = [' '.join(filter(None, _against(row.get(key), goal)))
                 for key, goal in (('time', time), ('peak_ratio', memory))]
        lines.append(f'  {name:16} time {parts[0]:24} peak {parts[1]:24} '
                     f'kernels run {_number(row, "busy_ratio", ".3f") or "?"}')
    return lines


def table_lines(case: Row) -> list[str]:
    """A case for a terminal."""
    lines = [f'  {name:16} {row["ms"]:8.1f} ms  x{row.get("time", 0):.3f}  host {row["host_ms"]:7.1f} ms  '
             f'{row.get("kernels", "?")} kernels, {_number(row, "busy", ".1f") or "?"} ms  '
             f'peak x{_number(row, "peak_ratio", ".3f") or "?"}' for name, row in case['rows'].items() if 'ms' in row]
    return lines + [f'  {name}: {reason}' for name, reason in case['left_out'].items()]


def _case(case: Row, rate: Row) -> list[str]:
    lines = [f'## {case["title"]}', '', *head(*COLUMNS)]
    lines += [cells(name, *_row(row, rate)) for name, row in case['rows'].items() if 'ms' in row] + ['']
    if case['regions']:
        lines.append('- regions: ' + ', '.join(f'{count} in {name}' for name, count in case['regions'].items()))
    lines += [f'- left out: {name}: {reason}' for name, reason in case['left_out'].items()]
    return [*lines, '']


def _row(row: Row, rate: Row) -> list[str]:
    floor = 1e3 * max(row['flops'] / rate['flops'], 2 * row['saved'] / rate['bytes']) if 'flops' in row else None
    time = f'{row["time"]:.3f} ({min(row["ratios"]):.3f} to {max(row["ratios"]):.3f})' if 'time' in row else ''
    busy = f'{row["busy"] / row["ms"]:.0%}' if 'busy' in row else ''
    return [f'{row["ms"]:.1f}', time, _number(row, 'host_ms', '.1f'), _number(row, 'kernels', 'd'),
            _number(row, 'busy', '.1f'), _number(row, 'busy_ratio', '.3f'), _number(row, 'copies', '.1f'), busy,
            _number(row, 'peak', '.2f', 1e9), _number(row, 'peak_ratio', '.3f'),
            _number(row, 'parameters', '.2f', 1e6), _number(row, 'flops', '.3f', 1e12),
            _number(row, 'saved', '.2f', 1e9), '' if floor is None else f'{floor:.1f}',
            '' if not floor else f'{row["ms"] / floor:.1f}']


def _number(row: Row, key: str, form: str, unit: int | float = 1) -> str:
    """A value as text; nothing where it wasn't measured."""
    return '' if key not in row else format(row[key] if unit == 1 else row[key] / unit, form)
