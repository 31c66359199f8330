"""What a report is made of, read from the folder of a comparison."""
import json
import statistics

import pytest

from rl_mmdet.analysis.compare import collect, contents, in_short, plan_comparison, train_all
from rl_mmdet.analysis.compare.bootstrap import paired_interval, resampled_precision
from rl_mmdet.analysis.compare.differences import Spread, difference, welch_interval
from rl_mmdet.analysis.compare.in_short import side, signed
from rl_mmdet.analysis.compare.runs import matches_of, scores_of
from rl_mmdet.analysis.compare.training_log import read_training_log

SKIP = {'model.backbone.type': 'RLResNet', 'model.backbone.replacement.plan.type': 'EveryKth',
        'model.backbone.replacement.plan.k': 2, 'model.backbone.replacement.operator.type': 'Skip'}


@pytest.fixture(scope='module')
def finished(write_tiny_config, write_tools, tmp_path_factory):
    """Three variants with two seeds: one finds everything, one nothing and fails once, one finds a part."""
    folder = tmp_path_factory.mktemp('comparison')
    configs = [f'base={write_tiny_config(folder, "atss_r34_fpn_digits.py")}', f'twin={write_tiny_config(folder)}']
    comparison = plan_comparison(folder / 'work', configs, {'worse': SKIP}, seeds=2)
    train_all(comparison, write_tools(folder), str)
    return comparison


def test_collect_averages_over_the_finished_runs(finished):
    found = collect(finished)
    base, twin, worse = found.variants
    aps = [scores_of(run)['bbox'].ap for run in finished.runs() if run.variant == 'worse']
    assert worse.scores['bbox']['ap'].values == aps
    assert worse.scores['bbox']['ap'].mean == pytest.approx(sum(aps) / 2)
    assert worse.scores['bbox']['ap'].deviation == pytest.approx(statistics.stdev(aps))
    assert worse.difference['bbox'].mean == pytest.approx(sum(aps) / 2 - 1)
    assert base.difference == {}
    assert len(twin.scores['bbox']['ap'].values) == 1
    assert twin.difference['bbox'].images is None
    assert base.scores['bbox']['ap_large'] is None
    assert list(worse.per_class['bbox']) == finished.classes


def test_collect_resamples_each_run_once_where_two_seeds_are_finished(finished, monkeypatch):
    resampled = []
    monkeypatch.setattr(contents, 'resampled_precision', lambda matches: resampled.append(matches) or
                        resampled_precision(matches, resamples=10))
    monkeypatch.setattr(finished, 'variants', [*finished.variants, finished.variants[-1]])
    *_, twin, worse, again = collect(finished).variants
    assert len(resampled) == 4  # the baseline's two and those of 'worse'
    assert twin.difference['bbox'].images is None
    assert worse.difference == again.difference


def test_collect_says_what_failed_and_why(finished):
    states = {(run.variant, run.seed): run for run in collect(finished).runs}
    assert states['twin', 1].status == 'failed'
    assert 'out of luck' in states['twin', 1].error
    assert states['base', 1].status == 'finished'
    assert states['base', 1].checkpoint == 'epoch_1.pth'
    assert states['base', 1].folder == 'runs/base/seed_1'


def test_in_short_names_one_seed_and_a_difference_that_is_sure(finished):
    twin, worse = in_short(collect(finished))
    assert twin.startswith('twin: ')
    assert 'AP (-1.000, but one seed only: no interval)' in twin
    assert worse.startswith('worse: ')
    assert 'AP (' in worse


def test_report_json_is_plain_json(finished, tmp_path):
    collect(finished).save(tmp_path / 'report.json')
    saved = json.loads((tmp_path / 'report.json').read_text())
    assert saved['format'] == 'rl_mmdet.report/1'
    assert saved['variants'][2]['options']['model.backbone.replacement.plan.k'] == 2


def test_verdict_needs_both_intervals(finished):
    base, twin = ([resampled_precision(matches_of(run, 'bbox')) for run in finished.runs()
                   if run.variant == name and run.seed == 0] for name in ('base', 'twin'))
    images = paired_interval(base, twin)
    sure = difference(Spread(1., .001, [1., 1.]), Spread(.5, .001, [.5, .5]), images)
    open_ = difference(Spread(1., .4, [1., 1.]), Spread(.5, .4, [.5, .5]), images)
    assert sure.images.high < 0
    assert (sure.verdict, open_.verdict) == ('worse', 'open')
    assert open_.low < sure.images.low < open_.high
    assert open_.widest == (open_.low, open_.high)


def test_welch_interval_has_the_textbook_value():
    low, high = welch_interval(Spread(10., 2., [0.] * 4), Spread(13., 3., [0.] * 5))
    error = (2 ** 2 / 4 + 3 ** 2 / 5) ** .5
    assert (low + high) / 2 == pytest.approx(3)
    assert (high - low) / 2 / error == pytest.approx(2.3746, abs=1e-4)  # t with 6.857 degrees of freedom


def test_welch_interval_of_equal_values_is_the_difference():
    assert welch_interval(Spread(1., 0., [1., 1.]), Spread(1.5, 0., [1.5, 1.5])) == (.5, .5)


@pytest.mark.parametrize(('ratios', 'verdict'), [
    ([.9] * 7, 'better'), ([1.1] * 7, 'worse'), ([.9] * 6 + [1.1], 'open'), ([1.] * 7, 'open'), ([.9] * 5, 'open'),
    ([.9] * 20 + [1.1] * 3, 'better'),
])
def test_side_is_a_sign_test(ratios, verdict):
    assert side(ratios) == verdict


def test_signed_has_no_negative_zero():
    assert (signed(-.0001), signed(.0126), signed(-.0126)) == ('+0.000', '+0.013', '-0.013')


def lines(folder, *rows):
    path = folder / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def test_training_log_joins_the_parts_of_a_resumed_training(tmp_path):
    train = dict(data_time=.1, time=.4, epoch=1)
    lines(tmp_path / '20260101_000000', dict(train, loss=3., step=10), dict(train, loss=2., step=20),
          {'coco/bbox_mAP': .25, 'step': 1}, dict(train, loss=1.5, step=30, epoch=2),
          {'replacement/backbone.layer1.1/a': .5, 'replacement/backbone.layer1.1/b': .4, 'step': 0}, '{"loss": 1.')
    lines(tmp_path / '20260102_000000', dict(train, loss=1.25, step=30, epoch=2, memory=100),
          dict(train, loss=1., step=40, epoch=2, memory=200), {'coco/bbox_mAP': -1., 'step': 2})
    log = read_training_log(tmp_path)
    assert log.loss == [(10, 3.), (20, 2.), (30, 1.25), (40, 1.)]
    assert log.ap == {'bbox': [(20, .25), (40, 0.)]}
    assert log.coefficients == {'backbone.layer1.1': [(0, .5, .4)]}
    assert log.data_share == pytest.approx(.25)
    assert log.peak_gpu_bytes == 200 * 2**20


def test_training_log_of_an_empty_folder_is_empty(tmp_path):
    log = read_training_log(tmp_path)
    assert (log.loss, log.ap, log.coefficients, log.data_share, log.peak_gpu_bytes) == ([], {}, {}, None, None)
