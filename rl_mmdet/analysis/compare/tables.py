"""The tables of a report, the same for Markdown, HTML and the terminal."""
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import rich.table
from rich.markup import escape

from .contents import FIELDS, Contents
from .costs import Cost
from .differences import Difference, Spread
from .verdict import SAME, side, side_of_count, signed

NONE = '–'
TITLES = {'bbox': 'Box AP', 'segm': 'Mask AP'}
TERMINAL_COLUMNS = 7


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
    """All tables of a report that have anything in them."""
    scored = contents.metrics if any(variant.scores for variant in contents.variants) else []
    found = [_precision_table(contents, metric) for metric in scored]
    return found + ([] if contents.baseline.cost is None else [_cost_table(contents)])


def rich_table(table: Table) -> rich.table.Table:
    """The table's first columns, which a terminal has room for."""
    found = rich.table.Table(title=table.title)
    for number, name in enumerate(table.header[:TERMINAL_COLUMNS]):
        found.add_column(name, justify='right' if number else 'left')
    for row in table.rows:
        found.add_row(*(escape(cell.text) for cell in row[:TERMINAL_COLUMNS]))
    return found


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
               'worse if both leave out 0; else the difference may be either way, and more seeds or more val images '
               'narrow the intervals.']
    aps = [variant.scores.get(metric, {}).get('ap') for variant in contents.variants]
    if any(ap and ap.deviation is None for ap in aps):
        caption.append('One seed only: no standard deviation and no interval, and nothing is called better or worse '
                       'in AP.')
    caption += sorted({f'{run.variant}, seed {run.seed}: {note}.' for run in contents.runs if metric in run.scores
                       for note in run.scores[metric].notes})
    return Table(TITLES[metric], header, rows, ' '.join(caption))


def _difference_cells(difference: Difference | None) -> list[Cell]:
    """The difference to the baseline, and its two intervals."""
    if difference is None:
        return [Cell('')] * 3
    return [Cell(signed(difference.mean), _mark(difference.verdict)),
            *(Cell(' to '.join(map(signed, each)) if each else NONE) for each in (difference.images, difference.seeds))]


def _spread(value: Spread | None) -> str:
    if value is None:
        return NONE
    return f'{value.mean:.3f}' + ('' if value.deviation is None else f' ± {value.deviation:.3f}')


def _cost_table(contents: Contents) -> Table:
    baseline, on_cpu = contents.baseline.cost, contents.environment['device'].startswith('CPU')
    columns = {'trainable parameters, M': _count(baseline, 'trainable', 1e6, '.3f'),
               'training step, GFLOPs': _count(baseline, 'step_flops', 1e9, '.2f'),
               'saved for backward, MB': _count(baseline, 'saved_bytes', 1e6, '.1f'),
               'peak of a step, MB': _count(baseline, 'peak_bytes', 1e6, '.1f'),
               'time of a step': _time('step', on_cpu),
               'latency': _time('latency', on_cpu)}
    rows = [[Cell(variant.name), *(Cell(NONE) if variant.cost is None else cell(variant.cost)
                                   for cell in columns.values())] for variant in contents.variants]
    height, width = baseline.image_size
    caption = (f'{contents.environment["device"]}; {baseline.batch} images of {height}×{width} in a training step, one '
               'in a prediction, which the materialized model makes. MB are 10⁶ bytes; the peak is the record of '
               f'{baseline.peak_of}. In brackets: over the baseline\'s. Counts that differ by less than {SAME:.1%} are '
               'called the same. Times are medians over rounds in which a variant and the baseline took turns in one '
               'process; their ratio in each round, its median, smallest and largest, is what compares variants, by a '
               'sign test (5 %; of 7 rounds all must agree).')
    if on_cpu:
        caption += ' On a CPU, which other programs use as well, only ratios are shown.'
    return Table('Cost', ['variant', *columns], rows, caption)


def _count(baseline: Cost, key: str, unit: float, form: str) -> Callable[[Cost], Cell]:
    def cell(cost: Cost) -> Cell:
        value = getattr(cost, key)
        if cost is baseline:
            return Cell(f'{value / unit:{form}}')
        reference = getattr(baseline, key)
        over = f' ({value / reference:.2f})' if reference else ''
        return Cell(f'{value / unit:{form}}{over}', _mark(side_of_count(value, reference)))
    return cell


def _time(key: str, on_cpu: bool) -> Callable[[Cost], Cell]:
    def cell(cost: Cost) -> Cell:
        ratios, seconds = getattr(cost, f'{key}_ratios'), median(getattr(cost, f'{key}_seconds'))
        time = f'{1000 * seconds:.{0 if seconds >= 0.1 else 1}f} ms'
        if set(ratios) == {1.}:
            return Cell('1' if on_cpu else time)
        ratio, spread = f'{median(ratios):.2f}', f'{min(ratios):.2f} to {max(ratios):.2f}'
        return Cell(f'{ratio} ({spread})' if on_cpu else f'{time} ({ratio}, {spread})', _mark(side(ratios)))
    return cell


def _mark(verdict: str | None) -> str:
    """The verdict if it is one to be shown."""
    return verdict if verdict in ('better', 'worse') else ''
