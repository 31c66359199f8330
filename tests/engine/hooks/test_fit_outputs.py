"""start=dict(type='FitOutputs') in a training: fitted once, before the first step, from a baseline's weights."""
import logging

import pytest
import torch
from mmengine.runner import Runner

from rl_mmdet.engine import UserError, add_rl_defaults_, build_model, check_training, load_config
from rl_mmdet.replacement import computing_layers
from rl_mmdet.replacement.start import layers_to_fit

START = '''
model = dict(backbone=dict(norm_eval=True, replacement=dict(
    fusion=dict(type='TransformFusion', share=0.5), start=dict(type='FitOutputs', batches=2, steps=4))))
'''


@pytest.fixture
def config(write_config, tmp_path):
    """The config of a tiny detector with the start, and its baseline's checkpoint."""
    def build(more: str = '', **changes) -> object:
        cfg = load_config(write_config(START + more, 'faster-rcnn_rl-r34-k2_fpn_digits.py'), changes,
                          work_dir=str(tmp_path / 'run'))
        return add_rl_defaults_(cfg)
    return build


@pytest.fixture
def checkpoint(write_config, tmp_path, randomise_):
    path = tmp_path / 'baseline.pth'
    model = build_model(load_config(write_config('', 'faster-rcnn_r34_fpn_digits.py')))
    torch.save(dict(state_dict=randomise_(model).state_dict()), path)
    return str(path)


def before_training(cfg) -> tuple[Runner, dict]:
    """The run as it is before its first step, and the layers' parameters."""
    runner = Runner.from_cfg(cfg)
    runner.train_loop  # noqa: B018  built when asked for
    runner._init_model_weights()
    runner.load_or_resume()
    runner.call_hook('before_train')
    layers = computing_layers(runner.model)
    return runner, {f'{name}.{key}': value.clone() for name, layer in layers.items()
                    for key, value in layer.own_parameters().items()}


def test_a_baseline_is_fitted_to_and_says_what_is_left_unexplained(config, checkpoint, caplog):
    cfg = config(load_from=checkpoint)
    check_training(cfg)
    with caplog.at_level(logging.INFO):
        runner, fitted = before_training(cfg)
    assert not layers_to_fit(runner.model)
    assert all(torch.any(value != 0) for key, value in fitted.items() if key.endswith('.up'))
    text = (runner.log_dir and next(iter(__import__('pathlib').Path(runner.log_dir).glob('*.log'))).read_text())
    assert 'computing layers fitted to the blocks that they replace in' in text
    assert 'backbone.layer2.1: ' in text


def test_the_same_seed_gives_the_same_fit_and_resuming_gives_none(config, checkpoint, tmp_path):
    first = before_training(config(load_from=checkpoint))
    second = before_training(config(load_from=checkpoint))
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(value, second[1][key]) for key, value in first[1].items())
    first[0].save_checkpoint(str(tmp_path), 'own.pth', save_optimizer=False, save_param_scheduler=False)
    own = before_training(config(load_from=str(tmp_path / 'own.pth')))
    assert all(torch.equal(value, own[1][key]) for key, value in first[1].items())
    assert not layers_to_fit(own[0].model)


def test_without_weights_to_fit_to_it_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(UserError, match=r"replacement.start: FitOutputs\(.*needs a trained baseline's weights, and none"):
        check_training(config())
    assert not (tmp_path / 'run').exists()


def test_a_search_refuses_it(config):
    plan = dict(type='LearnedPlan', budget=dict(params=0.9), iters=4)
    cfg = config()
    cfg.model.backbone.replacement.plan = plan
    with pytest.raises(UserError, match='is a fit before the first step, and LearnedPlan.* chooses later; leave start out'):
        check_training(cfg)
