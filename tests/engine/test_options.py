"""The tools' options as changes of a config."""
import pytest
from mmengine.config import Config

from rl_mmdet.engine import UserError, load_config, options


@pytest.mark.parametrize(('device', 'wrapper', 'complaint'), [
    ('cpu', 'OptimWrapper', '--amp: .*needs a GPU'), ('cuda', 'ApexOptimWrapper', "got 'ApexOptimWrapper'")])
def test_amp_is_refused_without_a_gpu_and_with_another_wrapper(monkeypatch, device, wrapper, complaint):
    monkeypatch.setattr(options, 'get_device', lambda: device)
    with pytest.raises(UserError, match=complaint):
        options.enable_amp_(Config(dict(optim_wrapper=dict(type=wrapper))))


def test_amp_makes_the_wrapper_a_dynamically_scaled_one(monkeypatch):
    monkeypatch.setattr(options, 'get_device', lambda: 'cuda')
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    options.enable_amp_(cfg)
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', loss_scale='dynamic')


def test_auto_scale_lr_needs_a_base_batch_size():
    with pytest.raises(UserError, match='base_batch_size'):
        options.enable_auto_scale_lr_(Config(dict(a=1)))
    cfg = Config(dict(auto_scale_lr=dict(base_batch_size=16, enable=False)))
    options.enable_auto_scale_lr_(cfg)
    assert cfg.auto_scale_lr.enable


def test_tta_wraps_model_and_pipeline(tiny_config):
    cfg = load_config(tiny_config())
    options.enable_tta_(cfg)
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module.type == 'ATSS'
    assert cfg.test_dataloader.dataset.pipeline[-1].type == 'TestTimeAug'
