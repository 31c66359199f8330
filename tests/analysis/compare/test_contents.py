"""What a report is made of, read from the folder of a comparison."""
import json
import statistics

import pytest

from rl_mmdet.analysis.compare import collect
from rl_mmdet.analysis.compare.differences import difference, spread, welch_interval
from rl_mmdet.analysis.compare.runs import scores_of
from rl_mmdet.analysis.compare.verdict import side, signed
from rl_mmdet.engine import UserError


@pytest.fixture(scope='module')
def collected(finished):
    return collect(finished[0])


def test_collect_averages_over_the_finished_runs_and_says_what_failed(finished, collected):
    comparison, _ = finished
    base, twin, worse = collected.variants
    aps = [scores_of(run)['bbox'].ap for run in comparison.runs() if run.variant == 'worse']
    assert worse.scores['bbox']['ap'] == spread(aps)
    assert worse.difference['bbox'].mean == pytest.approx(statistics.fmean(aps) - 1)
    low, high = worse.difference['bbox'].images
    assert low < worse.difference['bbox'].mean < high <= 0
    assert base.difference == {} and base.scores['bbox']['ap_large'] is None
    assert twin.scores['bbox']['ap'].values == [0] and twin.difference['bbox'].images is None
    states = {(run.variant, run.seed): run for run in collected.runs}
    assert states['twin', 1].status == 'failed' and 'out of luck' in states['twin', 1].error
    done = states['base', 1]
    assert (done.status, done.checkpoint, done.folder) == ('finished', 'epoch_1.pth', 'runs/base/seed_1')
    saved = json.loads(collected.as_json())
    assert saved['format'] == 'rl_mmdet.report/3'
    assert saved['variants'][2]['options']['model.backbone.replacement.plan.k'] == 2


def test_collect_refuses_runs_that_were_scored_on_other_annotations(finished):
    comparison, _ = finished
    path = comparison.runs()[-1].folder / 'scores.json'
    before = path.read_text()
    path.write_text(json.dumps({'bbox': json.loads(before)['bbox'] | dict(objects=10**6)}))
    try:
        with pytest.raises(UserError, match='worse, seed 1: it was scored on other annotations than base, seed 0'):
            collect(comparison)
    finally:
        path.write_text(before)


@pytest.mark.parametrize('name', ['runs/base/seed_0/scores.json', 'runs/base/seed_0/resampled.json',
                                  'costs.json'])
@pytest.mark.parametrize('content', [b'', b'{"bbox": {"a', b'{"costs": 3, "bbox": 1}', b'PK'])
def test_a_truncated_or_changed_result_file_is_one_line(finished, name, content):
    path = finished[0].folder / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        with pytest.raises(UserError, match=rf'{path.name}: truncated or changed .*; delete .* made again$'):
            collect(finished[0])
    finally:
        path.write_bytes(before) if before is not None else path.unlink()


def test_verdict_needs_both_intervals():
    images = -.55, -.45
    sure = difference(spread([1., 1.001]), spread([.5, .501]), images)
    unsure = difference(spread([1.3, .7]), spread([.8, .2]), images)
    better = difference(spread([.5, .501]), spread([1., 1.001]), (.45, .55))
    assert (sure.verdict, unsure.verdict, better.verdict) == ('worse', 'open', 'better')


def test_welch_interval_has_the_textbook_value():
    reference, other = [8., 9., 11., 12.], [9., 12., 13., 15., 16.]
    low, high = welch_interval(reference, other)
    error = (statistics.variance(reference) / 4 + statistics.variance(other) / 5) ** .5
    assert (low + high) / 2 == pytest.approx(3)
    assert (high - low) / 2 / error == pytest.approx(2.3746, abs=1e-4)  # t with 6.857 degrees of freedom


@pytest.mark.filterwarnings('error')
def test_welch_interval_of_equal_values_is_the_difference():
    assert welch_interval([1., 1.], [1.5, 1.5]) == (.5, .5)


@pytest.mark.parametrize(('ratios', 'verdict'), [
    ([.9] * 7, 'better'), ([1.1] * 7, 'worse'), ([.9] * 6 + [1.1], 'open'), ([1.] * 7, 'open'), ([.9] * 5, 'open'),
    ([.9] * 20 + [1.1] * 3, 'better'),
])
def test_side_is_a_sign_test(ratios, verdict):
    assert side(ratios) == verdict


def test_signed_has_no_negative_zero():
    assert (signed(-.0001), signed(.0126), signed(-.0126)) == ('+0.000', '+0.013', '-0.013')


def test_ap_during_a_resumed_training_is_joined_from_its_logs_and_an_unfinished_line_passed_over(comparison):
    run = comparison.runs()[0]
    for day, rows in ((1, [{'coco/bbox_mAP': .25, 'step': 1}, {'coco/bbox_mAP': .3, 'step': 2}, {'loss': 1.}]),
                      (2, [{'coco/bbox_mAP': .35, 'step': 2}, {'coco/bbox_mAP': -1., 'step': 3}])):
        path = run.folder / f'2026010{day}_000000' / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(map(json.dumps, rows)) + '\n{"coco/bbox_mAP": 1.')
    assert collect(comparison).runs[0].curves == {'bbox': [(1, .25), (2, .35), (3, 0.)]}
