"""The plots of a report."""
import math

import numpy as np
import pytest

from rl_mmdet.analysis.compare.contents import FIELDS, Contents, RunResult, VariantResult
from rl_mmdet.analysis.compare.costs import Cost
from rl_mmdet.analysis.compare.differences import spread
from rl_mmdet.analysis.compare.plots import coefficients, curves, mean_curve, pareto, pareto_front, styles
from rl_mmdet.analysis.compare.training_log import TrainingLog
from rl_mmdet.analysis.training_run import TrainingCost


def make_cost(part=1.):
    return Cost(40, int(40e6 * part), 8, 10, int(2e9 * part), 5, int(7e6 * part), 'torch', [1.] * 3,
                [.9 * part, 1. * part, 1.2 * part], [1.] * 3, [1.] * 3, [1.] * 3, [1.] * 3, 2, (64, 64))


def make_variant(name, aps=(), part=1.):
    scores = {'bbox': {field: spread(aps) for field in FIELDS}} if aps else {}
    return VariantResult(name, 'config.py', {}, scores, cost=None if part is None else make_cost(part))


def make_contents(variants, runs=(), seeds=2):
    return Contents([], {'device': 'CPU'}, 4, 9, ['1'], ['bbox'], seeds, list(variants), list(runs))


def make_run(variant, seed=0, status='finished', **log):
    return RunResult(variant, seed, status, None, {}, TrainingCost(), TrainingLog(**log), 'runs', None)


def legend(figure):
    return [text.get_text() for each in figure.legends for text in each.get_texts()]


def test_pareto_front_holds_what_nothing_beats_by_rising_cost():
    points = [(3., .5), (1., .2), (2., .1), (2., .4), (4., .5)]
    assert pareto_front(points) == [1, 3, 0]


def test_pareto_front_keeps_equal_points_and_drops_a_worse_one_of_the_same_cost():
    assert pareto_front([(1., .3), (1., .3), (1., .2)]) == [0, 1]


def test_pareto_draws_each_variants_mean_at_its_cost():
    figure = pareto(make_contents([make_variant('base', (.3, .5)), make_variant('small', (.2, .4), .5)]), 'bbox')
    panels = {axes.get_xlabel(): axes for axes in figure.axes}
    parameters = panels['trainable parameters, M']
    points = [line.get_xydata()[0].tolist() for container in parameters.containers for line in container[:1]]
    assert np.allclose(points, [[40, .4], [20, .3]])
    front = parameters.lines[0].get_xydata()
    assert np.allclose(front, [[20, .3], [40, .4]])
    assert len(panels) == 4


def test_pareto_extends_times_over_the_range_of_the_rounds():
    figure = pareto(make_contents([make_variant('base', (.3, .5))]), 'bbox')
    (container,) = figure.axes[3].containers
    times, precision = container[2]
    assert np.allclose(times.get_segments()[0], [[.9, .4], [1.2, .4]])
    assert np.allclose(precision.get_segments()[0][:, 1], [.4 - math.sqrt(.02), .4 + math.sqrt(.02)])


def test_pareto_with_one_seed_has_no_error_bar_of_ap():
    figure = pareto(make_contents([make_variant('base', (.3,))], seeds=1), 'bbox')
    assert not figure.axes[0].containers[0].has_yerr


@pytest.mark.parametrize('variant', [make_variant('base', (), 1.), make_variant('base', (.3,), None)])
def test_pareto_without_both_ap_and_cost_is_none(variant):
    assert pareto(make_contents([variant]), 'bbox') is None


def test_styles_tell_ten_variants_apart_without_colours():
    looks = styles(make_contents([make_variant(str(i)) for i in range(10)])).values()
    assert len({look.marker for look in looks}) == 10
    assert len({(look.colour, look.line) for look in looks}) == 10


def test_mean_curve_is_over_the_iterations_that_all_seeds_have():
    steps, mean, low, high = mean_curve([[(1, 1.), (2, 2.), (3, 3.)], [(2, 4.), (3, 5.), (4, 6.)]])
    assert steps.tolist() == [2, 3]
    assert (mean.tolist(), low.tolist(), high.tolist()) == ([3, 4], [2, 3], [4, 5])


def test_mean_curve_of_seeds_without_a_common_iteration_is_empty():
    assert all(len(each) == 0 for each in mean_curve([[(1, 1.)], [(2, 2.)]]))


def test_curves_draw_finished_trainings_where_there_are_any():
    runs = [make_run('base', 0, loss=[(10, 2.), (20, 1.)]),
            make_run('base', 1, 'failed', loss=[(10, 9.), (20, 9.)]),
            make_run('other', 0, 'unfinished', loss=[(10, 3.), (20, 3.)])]
    figure = curves(make_contents([make_variant('base'), make_variant('other'), make_variant('silent')], runs))
    (axes,) = figure.axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[2, 1], [3, 3]]
    assert legend(figure) == ['base', 'other']


def test_curves_smooth_the_loss_and_leave_out_what_is_not_finite():
    loss = [(step, 1. if step % 2 else 3.) for step in range(400)] + [(400, math.nan), (401, math.inf)]
    figure = curves(make_contents([make_variant('base')], [make_run('base', loss=loss)]))
    values = figure.axes[0].lines[0].get_ydata()
    assert len(values) == 200
    assert np.abs(values - 2).max() < .2


def test_curves_draw_ap_below_the_loss():
    run = make_run('base', loss=[(1, 1.), (2, 1.)], ap={'bbox': [(2, .5)]})
    figure = curves(make_contents([make_variant('base')], [run]))
    assert [axes.get_ylabel() for axes in figure.axes] == ['training loss', 'Box AP on the val set']


def test_curves_and_coefficients_without_logs_are_none():
    contents = make_contents([make_variant('base')], [make_run('base')])
    assert curves(contents) is None
    assert coefficients(contents) is None


def test_coefficients_have_a_panel_for_each_block_with_a_solid_and_b_dashed():
    runs = [make_run('base'),
            make_run('RL', coefficients={'layer1.10': [(0, .5, .5), (9, .6, .4)], 'layer1.2': [(0, .5, .5)]}),
            make_run('RL', 1, coefficients={'layer1.10': [(0, .5, .5), (9, .7, .3)]})]
    figure = coefficients(make_contents([make_variant('base'), make_variant('RL')], runs))
    assert [axes.get_title() for axes in figure.axes] == ['layer1.2', 'layer1.10']
    lines = figure.axes[1].lines
    assert [(line.get_linestyle(), line.get_ydata().tolist()) for line in lines] == [
        ('-', [.5, .6]), ('--', [.5, .4]), ('-', [.5, .7]), ('--', [.5, .3])]
    assert legend(figure) == ['a', 'b', 'RL']


def test_coefficients_of_many_blocks_say_how_many_are_shown():
    run = make_run('RL', coefficients={f'block{i}': [(0, .5, .5)] for i in range(30)})
    figure = coefficients(make_contents([make_variant('RL')], [run]))
    assert figure.get_suptitle() == '24 of 30 replaced blocks'
    titles = [axes.get_title() for axes in figure.axes]
    assert (len(titles), titles[0], titles[-1]) == (24, 'block0', 'block29')
