"""The config of a materialized detector has nothing of Replacement Learning in it, unless that is still needed."""
import pytest
from mmengine.config import Config

from rl_mmdet.deploy.plain_config import plain_config
from rl_mmdet.models import RLResNet

SETTINGS = dict(replacement=dict(plan=dict(type='EveryKth', k=2)), fold_norm=True, transfer=dict(budget=0.1))
OURS = """
custom_imports = dict(imports=['mine', 'rl_mmdet'], allow_failed_imports=False)
replacement = dict(plan=dict(type='EveryKth', k=2))
model = dict(type='ATSS', backbone=dict(type='RLResNet', replacement=replacement))
custom_hooks = [dict(type='StartHook'), dict(type='EMAHook'), dict(type='FiniteLossHook')]
default_hooks = dict(checkpoint=dict(type='WholeCheckpointHook', interval=2))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor', clip_grad=dict(max_norm=10))
load_from, resume, work_dir = 'baseline.pth', True, 'work'
"""
PLAIN = """
custom_imports = dict(imports=['mine'], allow_failed_imports=False)
model = dict(type='ATSS', backbone=dict(type='ResNet'))
custom_hooks = [dict(type='EMAHook')]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=2))
optim_wrapper = dict(constructor='DefaultOptimWrapperConstructor', clip_grad=dict(max_norm=10))
load_from, resume = None, False
"""


@pytest.mark.parametrize(('ours', 'plain'), [
    (dict(type='RLResNet', depth=50), dict(type='ResNet', depth=50)),
    (dict(type='mmdet.RLResNetV1d', depth=50), dict(type='mmdet.ResNetV1d', depth=50)),
    (dict(type=RLResNet, depth=50), dict(type='mmdet.models.backbones.resnet.ResNet', depth=50)),
    (dict(type='RLSwin', depths=(2, 2, 6, 2)), dict(type='SwinTransformer', depths=(2, 2, 6, 2))),
    (dict(type='RLBackbone', backbone='MobileNetV2', widen_factor=1.), dict(type='MobileNetV2', widen_factor=1.)),
    (dict(type='RLBackbone', backbone=dict(type='RLResNet', depth=50)), dict(type='ResNet', depth=50)),
])
def test_backbones_are_of_the_type_that_ours_extend(ours, plain):
    cfg, needs = plain_config(Config(dict(model=dict(detector=dict(backbone=ours | SETTINGS)))))
    assert cfg.model.to_dict() == dict(detector=dict(backbone=plain))
    assert needs == []
    assert 'custom_imports' not in cfg


@pytest.mark.parametrize('ours', [dict(type='RLBackbone', timm='resnet18'), dict(type='RLViT', arch='tiny')])
def test_what_no_other_package_builds_stays_ours_and_is_named(ours):
    cfg, needs = plain_config(Config(dict(model=dict(backbone=ours | SETTINGS, neck=dict(type='SimpleFPN')))))
    assert cfg.model.backbone.to_dict() == ours
    assert needs == sorted([ours['type'], 'SimpleFPN'])
    assert cfg.custom_imports.imports == ['rl_mmdet']


@pytest.mark.parametrize(('ours', 'plain', 'needs'), [
    ('RLOptimWrapperConstructor', 'DefaultOptimWrapperConstructor', []),
    ('RLLearningRateDecayOptimizerConstructor', 'LearningRateDecayOptimizerConstructor', []),
    ('RLLayerDecayOptimWrapperConstructor', 'RLLayerDecayOptimWrapperConstructor',
     ['RLLayerDecayOptimWrapperConstructor']),
])
def test_learning_rates_stay_what_they_were(ours, plain, needs):
    paramwise = dict(layer_decay_rate=0.7)
    cfg, found = plain_config(Config(dict(
        model=dict(backbone=dict(type='ResNet')), optim_wrapper=dict(constructor=ours, paramwise_cfg=paramwise))))
    assert cfg.optim_wrapper.to_dict() == dict(constructor=plain, paramwise_cfg=paramwise)
    assert found == needs


def test_all_else_stays_but_for_what_training_with_replacement_has_added(tmp_path):
    found, wanted = (tmp_path / name for name in ('ours.py', 'plain.py'))
    found.write_text(OURS)
    wanted.write_text(PLAIN)
    cfg, _ = plain_config(Config.fromfile(found, import_custom_modules=False))
    assert cfg.to_dict() == Config.fromfile(wanted, import_custom_modules=False).to_dict()


def test_classes_of_a_lazy_config_go_by_their_names(tmp_path):
    (tmp_path / 'lazy.py').write_text('from mmdet.models import ATSS\nfrom rl_mmdet.models import RLResNet\n'
                                      'model = dict(type=ATSS, backbone=dict(type=RLResNet, fold_norm=True))\n')
    cfg, _ = plain_config(Config.fromfile(tmp_path / 'lazy.py'))
    assert Config.fromstring(cfg.pretty_text, '.py').model.to_dict() == dict(
        type='mmdet.models.ATSS', backbone=dict(type='mmdet.models.backbones.resnet.ResNet'))
