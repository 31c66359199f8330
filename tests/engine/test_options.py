"""The tools' options as changes of a config."""
import pytest
from mmengine.config import Config

from rl_mmdet.engine import (
    UserError,
    check_out_file,
    enable_amp_,
    enable_auto_scale_lr_,
    enable_tta_,
    load_config,
    options,
    set_resume_,
)


def test_amp_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(options, 'get_device', lambda: 'cpu')
    with pytest.raises(UserError, match='--amp: .*needs a GPU'):
        enable_amp_(Config(dict(optim_wrapper=dict(type='OptimWrapper'))))


def test_amp_makes_the_wrapper_a_dynamically_scaled_one(monkeypatch):
    monkeypatch.setattr(options, 'get_device', lambda: 'cuda')
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    enable_amp_(cfg)
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', loss_scale='dynamic')


def test_amp_with_another_wrapper_is_refused(monkeypatch):
    monkeypatch.setattr(options, 'get_device', lambda: 'cuda')
    with pytest.raises(UserError, match="got 'ApexOptimWrapper'"):
        enable_amp_(Config(dict(optim_wrapper=dict(type='ApexOptimWrapper'))))


def test_auto_scale_lr_without_a_base_batch_size_is_refused():
    with pytest.raises(UserError, match='base_batch_size'):
        enable_auto_scale_lr_(Config(dict(a=1)))


def test_auto_scale_lr_is_enabled():
    cfg = Config(dict(auto_scale_lr=dict(base_batch_size=16, enable=False)))
    enable_auto_scale_lr_(cfg)
    assert cfg.auto_scale_lr.enable


@pytest.mark.parametrize(('source', 'load_from'), [('auto', None), ('epoch_3.pth', 'epoch_3.pth')])
def test_resume_sets_where_to_go_on_from(source, load_from):
    cfg = Config(dict(load_from='baseline.pth'))
    set_resume_(cfg, source)
    assert cfg.resume
    assert cfg.load_from == load_from


def test_tta_wraps_model_and_pipeline(tiny_config):
    cfg = load_config(tiny_config())
    enable_tta_(cfg)
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module.type == 'ATSS'
    assert cfg.test_dataloader.dataset.pipeline[-1].type == 'TestTimeAug'


def test_out_file_must_be_a_pickle():
    with pytest.raises(UserError, match='predictions.json'):
        check_out_file('predictions.json')
