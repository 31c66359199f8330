import pytest

from rl_mmdet.analysis.zoo import ZooConfig, check, check_config
from rl_mmdet.analysis.zoo.check import check_steps
from rl_mmdet.engine import UserError
from rl_mmdet.replacement import ComputingLayer


def test_check_runs_a_model_and_its_twin(tiny_config):
    baseline, result = check_steps(tiny_config())
    assert (baseline.baseline, baseline.rl) == ('runs', 'not tried')
    assert (result.config, result.baseline, result.rl, result.reason) == ('tiny/fcos.py', 'runs', 'runs', '')
    assert result.replaced == 4  # layer1.1, layer2.1, layer3.1, layer3.3
    assert result.size == 64


def test_check_leaves_the_config_as_it_is(tiny_config, tiny_model):
    config = tiny_config()
    check_config(config)
    assert config.model == tiny_model()


def test_check_says_that_no_block_can_be_replaced(tiny_config):
    result = check_config(tiny_config(depth=18, base_channels=16))
    assert (result.baseline, result.rl, result.replaced) == ('runs', 'no replaceable block', 0)
    assert result.reason.endswith('blocks that can be replaced: none (no kept block after it in its stage)')


def test_check_runs_synchronised_norms_in_one_process(tiny_config):
    assert check_config(tiny_config(norm_cfg=dict(type='MMSyncBN'))).rl == 'runs'


def test_check_of_a_frozen_backbone(tiny_config):
    result = check_config(tiny_config(frozen_stages=3))
    assert (result.baseline, result.rl) == ('runs', 'no replaceable block')


def test_check_says_why_a_baseline_cannot_be_built(tiny_config):
    result = check_config(tiny_config(depth=51))
    assert (result.baseline, result.rl) == ('fails', 'not tried')
    assert result.reason.startswith('build: ')
    assert '51' in result.reason


def test_check_says_why_a_baseline_does_not_train(tiny_config):
    result = check_config(tiny_config(base_channels=8))
    assert (result.baseline, result.rl) == ('fails', 'not tried')
    assert result.reason.startswith('training step: RuntimeError: ')


def test_check_enlarges_the_images_for_models_that_need_it(tiny_config, monkeypatch):
    monkeypatch.setattr(check, 'SIZES', (4, 64))
    monkeypatch.setattr(check, 'training_batch', _refuse_small(check.training_batch))
    assert check_config(tiny_config()).size == 64


def test_check_of_a_config_without_model():
    assert check_config(ZooConfig('a/b.py', reason='holds no model')).reason == 'holds no model'


def test_check_says_why_a_twin_does_not_run(tiny_config, monkeypatch):
    monkeypatch.setattr(ComputingLayer, 'forward', lambda layer, x: x[:, :1])
    result = check_config(tiny_config())
    assert (result.baseline, result.rl) == ('runs', 'fails')
    assert result.reason.startswith('training step: RuntimeError: ')


def test_check_finds_replaced_blocks_without_gradient(tiny_config, monkeypatch):
    forward = ComputingLayer.forward
    monkeypatch.setattr(ComputingLayer, 'forward', lambda layer, x: forward(layer, x).detach() + 0 * x)
    result = check_config(tiny_config())
    assert result.rl == 'fails'
    assert 'layer' in result.reason
    assert result.reason.endswith('gets no gradient, the baseline\'s block does')


def test_check_finds_losses_that_are_not_finite(tiny_config, monkeypatch):
    forward = ComputingLayer.forward
    monkeypatch.setattr(ComputingLayer, 'forward', lambda layer, x: forward(layer, x) * float('nan'))
    result = check_config(tiny_config())
    assert result.rl == 'fails'
    assert result.reason.endswith('is nan')


def test_check_takes_the_first_block_where_every_other_is_none(tiny_config, monkeypatch):
    nothing = dict(type='EveryKth', k=50, offset=49)
    monkeypatch.setattr('rl_mmdet.analysis.zoo.swap.EVERY_OTHER', nothing)
    result = check_config(tiny_config())
    assert (result.rl, result.replaced) == ('runs', 1)


def _refuse_small(batch):
    def make(model, size, classes):
        if size < 64:
            raise ValueError('too small')
        return batch(model, size, classes)
    return make


@pytest.mark.parametrize(('error', 'reason'), [
    (ImportError('class `X` in a/b.py: mmpretrain is not installed, see /a/b'), 'needs the package mmpretrain'),
    (FileNotFoundError('/root/x/sort/a.py does not exist'), 'a file is missing: a.py does not exist'),
    (ValueError('class `X` in a/b.py: k must be 2'), 'build: ValueError: k must be 2'),
    (RuntimeError('one\ntwo'), 'build: RuntimeError: one'),
    (RuntimeError('a_b_forward_impl: implementation for device cpu not found.'), "mmcv's a_b has no CPU form"),
    (UserError('model: depth is wrong'), 'build: depth is wrong')])
def test_short_reason(error, reason):
    assert check.short_reason(error, 'build') == reason
