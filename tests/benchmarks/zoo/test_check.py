"""What is said of one model: that it runs, or why it, or its replaced twin, doesn't."""
import pytest

from rl_mmdet.engine import UserError
from rl_mmdet.replacement import ComputingLayer
from zoo import swap
from zoo.check import check_steps
from zoo.configs import ZooConfig
from zoo.processes import check_in_process
from zoo.reasons import short_reason

FORWARD = ComputingLayer.forward


@pytest.fixture
def check():
    """Check an FCOS with 4 channels, with settings of its backbone changed; returns the last result."""
    def run(**backbone):
        body = dict(type='ResNet', depth=50, base_channels=4, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1),
                    out_indices=(1, 2), norm_eval=True)
        model = dict(
            type='FCOS', data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
            backbone=body | backbone, neck=dict(type='FPN', in_channels=[32, 64], out_channels=8, num_outs=2),
            bbox_head=dict(type='FCOSHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1,
                           norm_cfg=None, strides=[8, 16], regress_ranges=((-1, 64), (64, 1e8))),
            test_cfg=dict(nms_pre=100, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10))
        *_, result = check_steps(ZooConfig('tiny/fcos.py', model))
        return result
    return run


@pytest.mark.parametrize('backbone', [{}, dict(norm_cfg=dict(type='MMSyncBN'))], ids=['BN', 'SyncBN'])
def test_a_model_that_runs_with_replaced_blocks(check, backbone):
    result = check(**backbone)
    assert (result.baseline, result.rl, result.reason) == ('runs', 'runs', '')
    assert result.replaced == 4  # layer1.1, layer2.1, layer3.1, layer3.3


def test_the_first_block_is_replaced_where_the_plan_replaces_none(check, monkeypatch):
    monkeypatch.setattr(swap, 'EVERY_OTHER', dict(type='EveryKth', k=50, offset=49))
    result = check()
    assert (result.rl, result.replaced) == ('runs', 1)


def test_a_model_without_replaceable_block(check):
    result = check(depth=18, base_channels=16)
    assert (result.baseline, result.rl, result.replaced) == ('runs', 'no replaceable block', 0)
    assert result.reason.endswith('blocks that can be replaced: none (no kept block after it in its stage)')


@pytest.mark.parametrize(('backbone', 'reason'), [(dict(depth=51), 'build: '),
                                                  (dict(base_channels=8), 'training step: RuntimeError: ')])
def test_a_baseline_that_does_not_run(check, backbone, reason):
    result = check(**backbone)
    assert (result.baseline, result.rl) == ('fails', 'not tried')
    assert result.reason.startswith(reason)


@pytest.mark.parametrize(('forward', 'reason'), [
    (lambda layer, x: x[:, :1], 'RuntimeError'),
    (lambda layer, x: FORWARD(layer, x).detach() + 0 * x, "gets no gradient, the baseline's block does"),
    (lambda layer, x: FORWARD(layer, x) * float('nan'), 'is nan')], ids=['error', 'no-gradient', 'nan'])
def test_a_replaced_model_that_does_not_run(check, monkeypatch, forward, reason):
    monkeypatch.setattr(ComputingLayer, 'forward', forward)
    result = check()
    assert (result.baseline, result.rl) == ('runs', 'fails')
    assert reason in result.reason


@pytest.mark.parametrize(('error', 'reason'), [
    (ImportError('class `X` in a/b.py: mmpretrain is not installed, see /a/b'), 'needs the package mmpretrain'),
    (FileNotFoundError('/root/x/sort/a.py does not exist'), 'a file is missing: a.py does not exist'),
    (ValueError('class `X` in a/b.py: k must be 2'), 'build: ValueError: k must be 2'),
    (RuntimeError('a_b_forward_impl: implementation for device cpu not found.'), "mmcv's a_b has no CPU form"),
    (UserError('model: depth is wrong'), 'build: depth is wrong')])
def test_reasons_are_short(error, reason):
    assert short_reason(error, 'build') == reason


@pytest.mark.parametrize(('code', 'limit', 'reason'), [
    ('import time\ntime.sleep(60)', 0.5, 'took longer than 0.5 s'),
    ("__import__('os')._exit(3)", 60, 'its process died (exit status 3'),
    ("raise ImportError('mmpretrain is not installed, in /some/folder')", 60, 'needs the package mmpretrain'),
    ('x = 1', 60, 'holds no model: settings for other configs')])
def test_a_config_that_hangs_or_dies_ends_its_own_process_only(tmp_path, code, limit, reason):
    config = tmp_path / 'config.py'
    config.write_text(code)
    result = check_in_process(str(config), limit)
    assert (result.baseline, result.rl) == ('fails', 'not tried')
    assert result.reason.startswith(reason)
