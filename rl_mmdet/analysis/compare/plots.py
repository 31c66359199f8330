"""The plots of a report: AP against cost, and in the course of the trainings."""
from collections.abc import Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .contents import Contents, VariantResult
from .tables import TITLES

BASELINE = '#000000'
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
"""Of Okabe and Ito's palette for colour-blind readers, all others that show on white."""
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '<', '>', '*')
LINES = ('-', '--', '-.', (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
WIDTH = 8.
"""Inches."""
EXPENSES = {'trainable parameters, M': lambda cost: [cost.trainable / 1e6],
            'training step, GFLOPs': lambda cost: [cost.step_flops / 1e9],
            'peak of a step, MB': lambda cost: [cost.peak_bytes / 1e6],
            'time of a step, over the baseline\'s': lambda cost: cost.step_ratios}
"""What AP is drawn against: all values that were measured of it."""


def styles(contents: Contents) -> dict[str, dict[str, Any]]:
    """Each variant's colour, marker and line, which depend on its place in the comparison alone."""
    return {variant.name: dict(color=COLOURS[(i - 1) % len(COLOURS)] if i else BASELINE,
                               marker=MARKERS[i % len(MARKERS)], linestyle=LINES[i % len(LINES)])
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
    panels, looks = figure.subplots(2, 2, sharey=True), styles(contents)
    for axes, title in zip(panels.flat, EXPENSES, strict=True):
        _draw_front(axes, title, shown, metric, looks)
    for axes in panels[:, 0]:
        axes.set_ylabel(TITLES[metric])
    handles = [Line2D([], [], **looks[variant.name] | dict(linestyle='', label=variant.name)) for variant in shown]
    _legend(figure, [*handles, Line2D([], [], color='0.5', linewidth=1.2, label='not beaten by any other')])
    return figure


def _draw_front(axes: Axes, title: str, shown: Sequence[VariantResult], metric: str,
                looks: dict[str, dict[str, Any]]) -> None:
    measured = [EXPENSES[title](variant.cost) for variant in shown]
    aps = [variant.scores[metric]['ap'] for variant in shown]
    points = [(median(values), ap.mean) for values, ap in zip(measured, aps, strict=True)]
    front = [points[i] for i in pareto_front(points)]
    axes.plot(*zip(*front, strict=True), color='0.5', linewidth=1.2, drawstyle='steps-post', zorder=1)
    for (value, mean), values, ap, variant in zip(points, measured, aps, shown, strict=True):
        axes.errorbar(value, mean, yerr=ap.deviation,
                      xerr=[[value - min(values)], [max(values) - value]] if len(values) > 1 else None,
                      **looks[variant.name], markersize=7.5, markeredgecolor='white', markeredgewidth=0.6,
                      elinewidth=0.9, capsize=2, zorder=3)
    axes.set_xlabel(title)
    _grid(axes)


def curves(contents: Contents) -> Figure | None:
    """AP on the val set during the trainings, a line for each, by the first metric.

    Of a variant with finished trainings only these are drawn.

    Returns:
        The figure; None if no training has logged any AP.
    """
    metric, looks, drawn = contents.metrics[0], styles(contents), {}
    figure = Figure(figsize=(WIDTH, 3.8), layout='constrained')
    axes = figure.subplots()
    for variant in contents.variants:
        runs = contents.runs_of(variant.name)
        for run in [run for run in runs if run.status == 'finished'] or runs:
            if points := run.curves.get(metric):
                drawn[variant.name], = axes.plot(*zip(*points, strict=True), **looks[variant.name], linewidth=1.1,
                                                 markersize=5, markeredgecolor='white', markeredgewidth=0.5,
                                                 markevery=max(1, len(points) // 6), label=variant.name)
    if not drawn:
        return None
    axes.set_xlabel('epoch, or iteration of a training that counts none')
    axes.set_ylabel(f'{TITLES[metric]} on the val set')
    _grid(axes)
    _legend(figure, list(drawn.values()))
    return figure


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
