"""tools/compare.py from the configs to the report."""
import contextlib
import io
import json

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rl_mmdet.analysis.compare import costs

SKIP = ['model.backbone.type=RLResNet', 'model.backbone.replacement.plan.type=EveryKth',
        'model.backbone.replacement.plan.k=2', 'model.backbone.replacement.operator.type=Skip']
FIND_MUCH = '''
model.update(test_cfg=dict(score_thr=0., nms_pre=1000, max_per_img=100))
train_cfg.update(max_epochs=6, val_interval=3)
param_scheduler = [dict(type='ConstantLR', factor=1., by_epoch=False)]
default_hooks = dict(logger=dict(interval=1))
'''


def stats_of(annotations, detections):
    """What pycocotools says, with nothing of ours."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(detections)), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.fixture
def compare(run_tool, monkeypatch):
    monkeypatch.setattr(costs, 'TURN', 0.)  # times are for the report only
    return run_tool('compare')


def test_a_comparison_from_configs_to_report_agrees_with_pycocotools(compare, tiny_config, tmp_path):
    configs = f'base={tiny_config("atss_r34_fpn_digits.py", FIND_MUCH)}', f'RL={tiny_config(more=FIND_MUCH)}'
    status, output = compare(*configs, '--seeds', 1, '--work-dir', tmp_path / 'work')
    assert status == 0, output.err[-2000:]
    report = json.loads((tmp_path / 'work' / 'report.json').read_text())
    assert [run['status'] for run in report['runs']] == ['finished'] * 2
    found = {}
    for run in report['runs']:
        stats = stats_of(tmp_path / 'digits/annotations/instances_val.json',
                         tmp_path / 'work' / run['folder'] / 'detections.bbox.json')
        scores = run['scores']['bbox']
        assert [scores[key] for key in ('ap', 'ap50', 'ap75', 'ap_small')] == pytest.approx(stats[:4], abs=1e-9)
        found[run['variant']] = stats[0]
        assert [step for step, _ in run['curves']['bbox']] == [3, 6]
    assert max(found.values()) > 0
    base, twin = report['variants']
    assert base['scores']['bbox']['ap'] == dict(mean=found['base'], deviation=None, values=[found['base']])
    assert twin['difference']['bbox']['mean'] == pytest.approx(found['RL'] - found['base'])
    assert twin['cost']['trainable'] < base['cost']['trainable']
    assert report['commands'][0].startswith('python ')
    assert 'difference' in output.out and f'{found["RL"]:.3f}' in output.out
    for name in ('report.html', 'report.md'):
        text = (tmp_path / 'work' / name).read_text()
        assert f'{found["RL"]:.3f}' in text and 'One seed only' in text

    status, output = compare('--report-only', '--work-dir', tmp_path / 'work', '--report-dir', tmp_path / 'other')
    assert status == 0, output.err[-2000:]
    assert json.loads((tmp_path / 'other' / 'report.json').read_text()) == report
    assert (tmp_path / 'other' / 'report.html').is_file()


def test_cost_only_trains_nothing(compare, tiny_config, tmp_path):
    status, output = compare(tiny_config('atss_r34_fpn_digits.py'), '--variant', 'skip', *SKIP, '--cost-only',
                             '--work-dir', tmp_path / 'work')
    assert status == 0, output.err[-2000:]
    report = json.loads((tmp_path / 'work' / 'report.json').read_text())
    assert {run['status'] for run in report['runs']} == {'unfinished'}
    base, skip = (variant['cost'] for variant in report['variants'])
    for count in ('step_flops', 'saved_bytes', 'peak_bytes', 'trainable'):
        assert skip[count] < base[count]
    assert not (tmp_path / 'work' / 'runs').exists()


def test_a_variant_that_is_added_is_measured_alone(compare, tiny_config, tmp_path):
    def measured(*more):
        status, output = compare(tiny_config('atss_r34_fpn_digits.py'), '--variant', 'skip', *SKIP, *more,
                                 '--cost-only', '--work-dir', tmp_path / 'work')
        assert status == 0, output.err[-2000:]
        found = json.loads((tmp_path / 'work' / 'report.json').read_text())['variants']
        return {each['name']: each['cost'] for each in found}, output.out

    before, _ = measured()
    after, said = measured('--variant', 'wide', 'model.neck.out_channels=16', 'model.bbox_head.in_channels=16')
    assert 'wide: building' in said and 'skip: building' not in said
    assert {name: after[name] for name in before} == before and after['wide']['step_flops']


@pytest.mark.parametrize(('arguments', 'complaint'), [
    (['--report-only'], 'there is no comparison in it'),
    (['--variant', 'x'], 'no config file is given'),
    (['missing.py', 'other.py'], 'error: missing: config missing.py'),
    (['missing.py', '--report-dir', __file__], 'test_compare.py: not a directory; give a folder'),
])
def test_a_mistake_ends_with_one_line_and_writes_nothing(compare, tmp_path, arguments, complaint):
    status, output = compare(*arguments, '--work-dir', tmp_path / 'work')
    assert status == 1
    assert complaint in output.err.splitlines()[-1]
    assert not (tmp_path / 'work').exists()
