"""The tables of a report, the same for Markdown, HTML and the terminal."""
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import rich.table
from rich.markup import escape

from .contents import FIELDS, Contents, RunResult, VariantResult
from .costs import Cost
from .differences import Difference, Spread
from .in_short import SAME, ratio, side, signed

NONE = '–'
TITLES = {'bbox': 'Box AP', 'segm': 'Mask AP'}


@dataclass(frozen=True)
class Cell:
    """Text, and what it means: ``'better'``, ``'worse'`` or nothing."""
    text: str
    mark: str = ''


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; the first column names the row."""
    title: str
    header: list[str]
    rows: list[list[Cell]]
    caption: str = ''


def tables(contents: Contents) -> list[Table]:
    """All tables of a report that have anything in them, the summary first."""
    scored = _scored(contents)
    found = [summary_table(contents)]
    found += [_precision_table(contents, metric) for metric in scored]
    if contents.baseline.cost is not None:
        found.append(_cost_table(contents))
    found += [_class_table(contents, metric) for metric in scored if len(contents.classes) > 1]
    if any(run.training.seconds for run in contents.runs):
        found.append(_run_table(contents))
    return found


def summary_table(contents: Contents) -> Table:
    """What matters most, a row for each variant."""
    scored = _scored(contents)
    columns = {} if contents.baseline.cost is None else _main_columns(contents.baseline.cost)
    rows = []
    for variant in contents.variants:
        cells = [Cell(variant.name)]
        for metric in scored:
            cells += [Cell(_spread(variant.scores.get(metric, {}).get('ap'))),
                      _difference_cells(variant.difference.get(metric))[0]]
        rows.append(cells + _cost_cells(variant, columns))
    titles = [title for metric in scored for title in (TITLES[metric], 'difference')]
    return Table('At a glance', ['variant', *titles, *columns], rows, 'AP: mean ± standard deviation over seeds, and '
                 'difference to the baseline. In brackets: over the baseline\'s; for times with the range '
                 'of the rounds, each against the baseline beside it.')


def rich_table(table: Table) -> rich.table.Table:
    """The table for a terminal."""
    found = rich.table.Table(title=table.title, caption=table.caption)
    for number, name in enumerate(table.header):
        found.add_column(name, justify='right' if number else 'left')
    for row in table.rows:
        found.add_row(*(escape(cell.text) for cell in row))
    return found


def _scored(contents: Contents) -> list[str]:
    """The metrics, if any training has its scores."""
    return contents.metrics if any(variant.scores for variant in contents.variants) else []


def _precision_table(contents: Contents, metric: str) -> Table:
    header = ['variant', 'trainings', 'AP', 'difference', '95 % over val images', '95 % over seeds', 'AP50', 'AP75',
              'AP small', 'AP medium', 'AP large']
    rows = []
    for variant in contents.variants:
        scores = variant.scores.get(metric, {})
        done = sum(run.status == 'finished' for run in contents.runs_of(variant.name))
        rows.append([Cell(variant.name), Cell(f'{done} of {contents.seeds}'), Cell(_spread(scores.get('ap'))),
                     *_difference_cells(variant.difference.get(metric)),
                     *(Cell(_spread(scores.get(key))) for key in FIELDS[1:])])
    caption = [f'On {contents.images} images with {contents.objects} objects; the last checkpoint of every training. '
               'Mean ± standard deviation over seeds. Difference: AP minus the baseline\'s, with two intervals: a '
               'paired bootstrap over the val images, and Welch\'s t over the seeds. A variant is called better or '
               'worse if both leave out 0.']
    aps = [variant.scores.get(metric, {}).get('ap') for variant in contents.variants]
    if any(ap and ap.deviation is None for ap in aps):
        caption.append('One seed only: no standard deviation and no interval.')
    caption += sorted({f'{run.variant}, seed {run.seed}: {note}.' for run in contents.runs if metric in run.scores
                       for note in run.scores[metric].notes})
    return Table(TITLES[metric], header, rows, ' '.join(caption))


def _difference_cells(difference: Difference | None) -> list[Cell]:
    """The difference to the baseline, and its two intervals."""
    if difference is None:
        return [Cell('')] * 3
    if difference.images is None:
        return [Cell(signed(difference.mean)), Cell(NONE), Cell(NONE)]
    mark = difference.verdict if difference.verdict != 'open' else ''
    return [Cell(signed(difference.mean), mark),
            Cell(f'{signed(difference.images.low)} to {signed(difference.images.high)}'),
            Cell(f'{signed(difference.low)} to {signed(difference.high)}')]


def _spread(value: Spread | None) -> str:
    if value is None:
        return NONE
    return f'{value.mean:.3f}' + ('' if value.deviation is None else f' ± {value.deviation:.3f}')


def _cost_table(contents: Contents) -> Table:
    baseline = contents.baseline.cost
    columns = _main_columns(baseline) | {
        'all parameters, M': _count(baseline, 'parameters', 1e6, '.3f'),
        'optimizer state, MB': _count(baseline, 'optimizer_bytes', 1e6, '.1f'),
        'forward, GFLOPs': _count(baseline, 'forward_flops', 1e9, '.2f'),
        'latency': _time('latency'),
        'latency, materialized': _time('plain_latency')}
    rows = [[Cell(variant.name), *_cost_cells(variant, columns)] for variant in contents.variants]
    height, width = baseline.image_size
    caption = (f'{contents.environment["device"]}; {baseline.batch} images of {height}×{width} in a training step, one '
               f'in a prediction. MB are 10⁶ bytes; the peak is the record of {baseline.peak_of}. In brackets: over '
               'the baseline\'s. Times are medians over rounds in which a variant and the baseline took turns in one '
               'process; their ratio in each round, its median, smallest and largest, is what compares variants.')
    return Table('Cost', ['variant', *columns], rows, caption)


def _main_columns(baseline: Cost) -> dict[str, Callable[[Cost], Cell]]:
    """What makes a cell of a cost, by the column's title."""
    return {'trainable parameters, M': _count(baseline, 'trainable', 1e6, '.3f'),
            'training step, GFLOPs': _count(baseline, 'step_flops', 1e9, '.2f'),
            'saved for backward, MB': _count(baseline, 'saved_bytes', 1e6, '.1f'),
            'peak of a step, MB': _count(baseline, 'peak_bytes', 1e6, '.1f'),
            'time of a step': _time('step')}


def _cost_cells(variant: VariantResult, columns: dict[str, Callable[[Cost], Cell]]) -> list[Cell]:
    return [Cell(NONE) if variant.cost is None else make(variant.cost) for make in columns.values()]


def _count(baseline: Cost, key: str, unit: float, form: str) -> Callable[[Cost], Cell]:
    def cell(cost: Cost) -> Cell:
        value = getattr(cost, key)
        if cost is baseline:
            return Cell(f'{value / unit:{form}}')
        over = ratio(value, getattr(baseline, key))
        mark = '' if abs(over - 1) < SAME else 'better' if over < 1 else 'worse'
        return Cell(f'{value / unit:{form}} ({over:.2f})', mark)
    return cell


def _time(key: str) -> Callable[[Cost], Cell]:
    def cell(cost: Cost) -> Cell:
        ratios, seconds = getattr(cost, f'{key}_ratios'), median(getattr(cost, f'{key}_seconds'))
        text = f'{1000 * seconds:.{0 if seconds >= 0.1 else 1}f} ms'
        if set(ratios) == {1.}:
            return Cell(text)
        return Cell(f'{text} ({median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f})',
                    side(ratios).replace('open', ''))
    return cell


def _class_table(contents: Contents, metric: str) -> Table:
    reference = contents.baseline.per_class.get(metric, {})
    rows = []
    for variant in contents.variants:
        cells = [Cell(variant.name)]
        for name in contents.classes:
            value, base = variant.per_class.get(metric, {}).get(name), reference.get(name)
            change = '' if variant is contents.baseline or None in (value, base) else f' ({signed(value - base)})'
            cells.append(Cell(NONE if value is None else f'{value:.3f}{change}'))
        rows.append(cells)
    return Table(f'{TITLES[metric]} by class', ['variant', *contents.classes], rows,
                 'Means over seeds; in brackets the difference to the baseline.')


def _run_table(contents: Contents) -> Table:
    header = ['variant', 'seed', 'state', *(TITLES[metric] for metric in contents.metrics),
              'peak of the GPU, MiB' if any(run.log.peak_gpu_bytes for run in contents.runs) else
              'peak resident set, MiB', 'waiting for data']
    return Table('Trainings', header, [_run_row(contents, run) for run in contents.runs],
                 'The peak is of the whole training process: of PyTorch\'s allocator on a GPU, else of the resident '
                 'set, libraries included. Waiting for data: median share of an iteration.')


def _run_row(contents: Contents, run: RunResult) -> list[Cell]:
    aps = [run.scores[metric].ap if metric in run.scores else None for metric in contents.metrics]
    peak = run.log.peak_gpu_bytes or run.training.peak_rss
    return [Cell(run.variant), Cell(str(run.seed)), Cell(run.status, 'worse' if run.status == 'failed' else ''),
            *(Cell(NONE if ap is None else f'{ap:.3f}') for ap in aps),
            Cell(f'{peak / 2**20:,.0f}' if peak else NONE),
            Cell(NONE if run.log.data_share is None else f'{run.log.data_share:.0%}')]
