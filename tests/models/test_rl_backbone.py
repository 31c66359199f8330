"""RLBackbone: what it builds, and what it refuses. test_backbones.py has what holds for every backbone it builds."""
import pytest
import torch
from mmdet.models.backbones import CSPNeXt, Darknet, ResNeSt
from mmdet.registry import MODELS
from mmengine.config import ConfigDict

from rl_mmdet.models import RLBackbone, RLResNet, RLResNetV1d, RLResNeXt, RLSwin
from rl_mmdet.replacement import computing_layers

EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2))
TINY = dict(depth=50, base_channels=4)
NEXT = dict(widen_factor=0.125)


# What it builds

def test_backbone_by_name_with_its_arguments_beside_it():
    model = RLBackbone('CSPNeXt', **NEXT, replacement=EVERY_SECOND)
    assert type(model) is CSPNeXt
    assert 'stage2.1.blocks.1' in computing_layers(model)


@pytest.mark.parametrize('cfg', [dict(type='CSPNeXt', **NEXT), ConfigDict(type='CSPNeXt', **NEXT),
                                 dict(type='mmdet.CSPNeXt', **NEXT), dict(type=CSPNeXt, **NEXT)])
def test_backbone_by_config(cfg):
    assert type(RLBackbone(cfg, replacement=EVERY_SECOND)) is CSPNeXt


def test_backbone_by_config_is_not_changed():
    cfg = dict(type='CSPNeXt', **NEXT)
    RLBackbone(cfg, norm_eval=True, replacement=EVERY_SECOND)
    assert cfg == dict(type='CSPNeXt', **NEXT)


def test_backbone_by_class():
    assert type(RLBackbone(CSPNeXt, **NEXT)) is CSPNeXt


def test_registry_builds_what_a_config_with_inherited_arguments_says():
    """A child config changes ``type`` and adds ``backbone``; everything else comes from its base."""
    model = MODELS.build(dict(type='RLBackbone', backbone='ResNeSt', **TINY, stem_channels=8, norm_eval=True,
                              replacement=EVERY_SECOND))
    assert type(model) is ResNeSt


@pytest.mark.parametrize(('name', 'cls', 'kwargs'), [
    ('ResNet', RLResNet, TINY), ('ResNetV1d', RLResNetV1d, TINY),
    ('ResNeXt', RLResNeXt, dict(TINY, groups=2, base_width=4)), ('SwinTransformer', RLSwin, dict(embed_dims=24))])
def test_backbone_that_has_an_rl_class_is_of_that_class(name, cls, kwargs):
    assert type(RLBackbone(name, **kwargs, replacement=EVERY_SECOND)) is cls


def test_report_is_an_attribute_of_the_backbone():
    report = RLBackbone('CSPNeXt', **NEXT, replacement=EVERY_SECOND).replacement_report
    assert report.replaced['stage2.1.blocks'] == [1, 3]


# What it refuses

REFUSED = {
    'neither': (dict(), r"RLBackbone takes either backbone=dict\(type='ResNeSt', ...\) or timm='convnext_tiny'"),
    'both': (dict(backbone='ResNet', timm='resnet18'), 'RLBackbone takes either backbone=.* or timm='),
    'unknown_type': (dict(backbone='ResNest'), "RLBackbone: unknown backbone type 'ResNest'; did you mean .*ResNeSt"),
    'unknown_type_of_another_package': (dict(backbone='mmnothing.ConvNeXt'),
                                        r"unknown backbone type 'mmnothing.ConvNeXt'.*; is its package installed"),
    'no_type': (dict(backbone=dict(depth=50)), 'RLBackbone: backbone must name a type, got None'),
    'given_twice': (dict(backbone=dict(type='ResNeSt', depth=50), depth=101, stem_channels=8),
                    'RLBackbone: depth is given both in backbone and beside it; leave one out'),
    'no_chains_timm': (dict(timm='vgg11', replacement=EVERY_SECOND), 'model has no chain of blocks'),
    'no_chains_mmdet': (dict(backbone='SSDVGG', depth=11, replacement=EVERY_SECOND), 'model has no chain of blocks'),
    'out_indices': (dict(backbone='CSPDarknet', out_indices=(1, 7)), r'CSPDarknet refuses its arguments: .*out_ind'),
    'frozen_stages': (dict(backbone='CSPDarknet', frozen_stages=12), r'frozen_stages must be in range.* received 12'),
    'wrong_plan': (dict(backbone='CSPNeXt', **NEXT, replacement=dict(plan=dict(type='Every'))),
                   r"replacement\.plan: unknown type 'Every'"),
}


@pytest.mark.parametrize(('arguments', 'match'), REFUSED.values(), ids=REFUSED)
def test_bad_argument_raises(arguments, match):
    with pytest.raises(ValueError, match=match):
        RLBackbone(**arguments)


def test_loading_a_baselines_file_of_another_width_raises(tmp_path):
    torch.save(Darknet().state_dict(), tmp_path / 'darknet.pth')
    model = RLBackbone('CSPNeXt', **NEXT, replacement=EVERY_SECOND)
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict(torch.load(tmp_path / 'darknet.pth'))
