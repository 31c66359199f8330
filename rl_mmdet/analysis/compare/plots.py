"""The plots of a report: AP against cost, the course of the trainings, the coefficients of replaced blocks."""
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .contents import Contents, RunResult, VariantResult
from .costs import Cost
from .tables import TITLES
from .training_log import Curve

BASELINE = '#000000'
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
"""Of Okabe and Ito's palette for colour-blind readers, all others that show on white."""
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '<', '>', '*')
LINES = ('-', '--', '-.', (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
WIDTH = 8.
"""Inches."""
POINTS = 200
"""Most points of a curve."""
SMOOTHING = 0.05
"""Part of a training that the running mean of the loss covers."""
MOST_BLOCKS, COEFFICIENT_POINTS = 24, 40


@dataclass(frozen=True)
class Style:
    """How a variant looks in every plot."""
    colour: str
    marker: str
    line: str | tuple


def styles(contents: Contents) -> dict[str, Style]:
    """Each variant's look, which depends on its place in the comparison alone."""
    return {variant.name: Style(COLOURS[(i - 1) % len(COLOURS)] if i else BASELINE, MARKERS[i % len(MARKERS)],
                                LINES[i % len(LINES)])
            for i, variant in enumerate(contents.variants)}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (cost, AP) that no other one beats, by rising cost.

    A point is beaten by one with no more cost and no less AP that isn't the same point.
    """
    def beaten(own: tuple[float, float]) -> bool:
        return any(cost <= own[0] and ap >= own[1] and (cost, ap) != own for cost, ap in points)
    return sorted((i for i, point in enumerate(points) if not beaten(point)), key=lambda i: points[i])


def pareto(contents: Contents, metric: str) -> Figure | None:
    """AP against what training costs, a panel for each kind of cost.

    Error bars are ± one standard deviation over seeds for AP, and the range of the rounds for times. The stepped line
    joins the variants that no other one beats.

    Args:
        contents: of the report.
        metric: ``'bbox'`` or ``'segm'``.

    Returns:
        The figure; None without a variant that has both AP and cost.
    """
    shown = [variant for variant in contents.variants
             if variant.cost is not None and variant.scores.get(metric, {}).get('ap') is not None]
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 6.4), layout='constrained')
    looks = styles(contents)
    panels = figure.subplots(2, 2, sharey=True)
    for axes, title in zip(panels.flat, ('trainable parameters, M', 'training step, GFLOPs', 'peak of a step, MB',
                                         'time of a step, over the baseline\'s'), strict=True):
        _draw_front(axes, [_expense(variant.cost, title) for variant in shown], shown, metric, looks)
        axes.set_xlabel(title)
    for axes in panels[:, 0]:
        axes.set_ylabel(TITLES[metric])
    handles = [Line2D([], [], color=looks[v.name].colour, marker=looks[v.name].marker, linestyle='', label=v.name)
               for v in shown]
    _legend(figure, [*handles, Line2D([], [], color='0.5', linewidth=1.2, label='not beaten by any other')])
    return figure


def _expense(cost: Cost, title: str) -> tuple[float, float, float]:
    """The cost that a panel shows, and how far it extends to the left and to the right."""
    if title.startswith('time'):
        middle = median(cost.step_ratios)
        return middle, middle - min(cost.step_ratios), max(cost.step_ratios) - middle
    value = {'trainable parameters, M': cost.trainable / 1e6, 'training step, GFLOPs': cost.step_flops / 1e9,
             'peak of a step, MB': cost.peak_bytes / 1e6}[title]
    return value, 0., 0.


def _draw_front(axes: Axes, expenses: Sequence[tuple[float, float, float]], shown: Sequence[VariantResult],
                metric: str, looks: dict[str, Style]) -> None:
    _grid(axes)
    points = [(expense[0], variant.scores[metric]['ap'].mean) for expense, variant in zip(expenses, shown, strict=True)]
    front = [points[i] for i in pareto_front(points)]
    axes.plot(*zip(*front, strict=True), color='0.5', linewidth=1.2, drawstyle='steps-post', zorder=1)
    for (value, left, right), variant in zip(expenses, shown, strict=True):
        ap, look = variant.scores[metric]['ap'], looks[variant.name]
        axes.errorbar(value, ap.mean, yerr=ap.deviation, xerr=[[left], [right]] if left or right else None,
                      color=look.colour, marker=look.marker, markersize=7.5, markeredgecolor='white',
                      markeredgewidth=0.6, elinewidth=0.9, capsize=2, zorder=3)


def curves(contents: Contents) -> Figure | None:
    """Loss and AP during the trainings: the mean over seeds, in a band from the lowest to the highest seed.

    The loss is a running mean over 5 % of the training. Of a variant with finished trainings only these are drawn.

    Returns:
        The figure; None without any log.
    """
    titles = ['training loss', *(f'{TITLES[metric]} on the val set' for metric in contents.metrics)]
    found = [{variant.name: [_smooth(run.log.loss) for run in _logged(contents, variant.name)]
              for variant in contents.variants}]
    found += [{variant.name: [run.log.ap.get(metric, []) for run in _logged(contents, variant.name)]
               for variant in contents.variants} for metric in contents.metrics]
    drawn = [(title, by_variant) for title, by_variant in zip(titles, found, strict=True)
             if any(curve for each in by_variant.values() for curve in each)]
    if not drawn:
        return None
    figure = Figure(figsize=(WIDTH, 3.4 * len(drawn)), layout='constrained')
    panels, looks = figure.subplots(len(drawn), squeeze=False, sharex=True), styles(contents)
    for axes, (title, by_variant) in zip(panels.flat, drawn, strict=True):
        for number, (name, each) in enumerate(by_variant.items()):
            _draw_curve(axes, each, looks[name], number / len(by_variant))
        axes.set_ylabel(title)
        _grid(axes)
    axes.set_xlabel('iteration')
    _legend(figure, [Line2D([], [], color=looks[name].colour, marker=looks[name].marker, linestyle=looks[name].line,
                            markersize=5, label=name)
                     for name in looks if any(any(by_variant[name]) for _, by_variant in drawn)])
    return figure


def _logged(contents: Contents, variant: str) -> list[RunResult]:
    """The finished trainings, or all if there is none."""
    runs = contents.runs_of(variant)
    return [run for run in runs if run.status == 'finished'] or runs


def _smooth(curve: Curve) -> Curve:
    """The running mean over a part of the curve, without points that aren't finite."""
    points = np.array([point for point in curve if np.isfinite(point[1])])
    if len(points) < 3:
        return [tuple(point) for point in points.tolist()]
    half = max(1, round(SMOOTHING * len(points) / 2))
    sums = np.concatenate([[0.], np.cumsum(points[:, 1])])
    index = np.arange(len(points))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(points))
    return list(zip(points[:, 0].tolist(), ((sums[high] - sums[low]) / (high - low)).tolist(), strict=True))


def mean_curve(curves_of_seeds: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Curves over the iterations that all of them have, each interpolated linearly.

    Args:
        curves_of_seeds: at least one, none of them empty.

    Returns:
        Iterations, mean, lowest and highest value there; at most ``POINTS`` of them.
    """
    first = max(curve[0][0] for curve in curves_of_seeds)
    last = min(curve[-1][0] for curve in curves_of_seeds)
    steps = np.unique([step for curve in curves_of_seeds for step, _ in curve if first <= step <= last])
    steps = steps[_spaced(len(steps), POINTS)]
    values = np.array([np.interp(steps, *np.array(curve).T) for curve in curves_of_seeds])
    return steps, values.mean(0), values.min(0), values.max(0)


def _spaced(count: int, most: int) -> np.ndarray:
    """Indices, all of them or ``most`` that are evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)) if count else np.zeros(0, int)


def _draw_curve(axes: Axes, curves_of_seeds: Sequence[Curve], look: Style, offset: float) -> None:
    """``offset``: from 0 to 1, so that variants have their markers at different places."""
    given = [curve for curve in curves_of_seeds if curve]
    if not given:
        return
    steps, mean, low, high = mean_curve(given)
    every = max(1, len(steps) // 6)
    axes.plot(steps, mean, color=look.colour, linestyle=look.line, linewidth=1.3, marker=look.marker, markersize=5,
              markeredgecolor='white', markeredgewidth=0.5, markevery=(int(offset * every), every))
    if len(given) > 1:
        axes.fill_between(steps, low, high, color=look.colour, alpha=0.12, linewidth=0)


def coefficients(contents: Contents) -> Figure | None:
    """The course of every replaced block's a (solid) and b (dashed): a panel for each block, a line for each seed.

    Returns:
        The figure, with at most 24 blocks, evenly spaced over the model; None without coefficients.
    """
    blocks = sorted({block for run in contents.runs for block in run.log.coefficients}, key=_natural)
    if not blocks:
        return None
    shown = [blocks[i] for i in _spaced(len(blocks), MOST_BLOCKS)]
    columns = min(len(shown), 3 if len(shown) <= 9 else 4)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 1.75 * rows), layout='constrained')
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    looks, seen = styles(contents), {}
    for axes, block in zip(panels, shown, strict=False):
        for run, steps, a, b in _pairs(contents, block):
            look = seen[run.variant] = looks[run.variant]
            style = dict(color=look.colour, linewidth=0.9, marker=look.marker, markersize=4, markevery=[-1])
            axes.plot(steps, a, linestyle='-', **style)
            axes.plot(steps, b, linestyle='--', **style)
        axes.set_title(block, fontsize=8)
        axes.tick_params(labelsize=8)
        _grid(axes)
    for number, axes in enumerate(panels):
        axes.set_visible(number < len(shown))
        if len(shown) - columns <= number < len(shown):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel('iteration', fontsize=9)
    if len(shown) < len(blocks):
        figure.suptitle(f'{len(shown)} of {len(blocks)} replaced blocks', fontsize=10)
    _legend(figure, [Line2D([], [], color='0.3', label='a'), Line2D([], [], color='0.3', linestyle='--', label='b'),
                     *(Line2D([], [], color=look.colour, marker=look.marker, markersize=5, linewidth=0.9, label=name)
                       for name, look in looks.items() if name in seen)])
    return figure


def _natural(name: str) -> list[tuple[int, str]]:
    """To sort by: numbers in the name count as numbers."""
    return [(int(part), '') if part.isdigit() else (-1, part) for part in re.split(r'(\d+)', name)]


def _pairs(contents: Contents, block: str) -> Iterator[tuple[RunResult, list[float], list[float], list[float]]]:
    """Each training's iterations, a and b."""
    for run in contents.runs:
        points = run.log.coefficients.get(block)
        if points:
            yield run, *map(list, zip(*(points[i] for i in _spaced(len(points), COEFFICIENT_POINTS)), strict=True))


def _grid(axes: Axes) -> None:
    axes.grid(color='0.9', linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.ticklabel_format(useOffset=False)


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Below all panels, with as many columns as fit."""
    longest = max(len(handle.get_label()) for handle in handles)
    figure.legend(handles=handles, loc='outside lower center', ncols=max(1, min(5, int(WIDTH * 12 / (longest + 6)))),
                  frameon=False, fontsize=9)
