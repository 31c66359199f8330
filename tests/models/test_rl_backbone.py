"""RLBackbone: what it builds, and what it refuses. test_backbones.py has what holds for every backbone it builds."""
import pytest
from mmdet.models.backbones import CSPNeXt
from mmdet.registry import MODELS
from mmengine.config import ConfigDict

from rl_mmdet.models import RLResNet, RLResNetV1d, RLResNeXt, RLSwin, build_rl_backbone
from rl_mmdet.replacement import computing_layers

EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2))
TINY = dict(depth=50, base_channels=4)
NEXT = dict(widen_factor=0.125)


@pytest.mark.parametrize('cfg', [
    dict(backbone='CSPNeXt', **NEXT), dict(backbone=dict(type='CSPNeXt', **NEXT)),
    dict(backbone=dict(type='mmdet.CSPNeXt'), **NEXT), dict(backbone=dict(type=CSPNeXt, **NEXT)),
    dict(backbone=CSPNeXt, **NEXT)], ids=['name', 'config', 'scope', 'class_in_config', 'class'])
def test_config_builds_the_named_backbone_with_its_arguments(cfg):
    given = ConfigDict(type='RLBackbone', norm_eval=True, replacement=EVERY_SECOND, **cfg)
    model = MODELS.build(given)
    assert (type(model), model.norm_eval) == (CSPNeXt, True)
    assert 'stage2.1.blocks.1' in computing_layers(model)
    assert model.replacement_report.replaced['stage2.1.blocks'] == [1, 3]
    assert given == ConfigDict(type='RLBackbone', norm_eval=True, replacement=EVERY_SECOND, **cfg)


@pytest.mark.parametrize(('name', 'cls', 'kwargs'), [
    ('ResNet', RLResNet, TINY), ('ResNetV1d', RLResNetV1d, TINY),
    ('ResNeXt', RLResNeXt, dict(TINY, groups=2, base_width=4)), ('SwinTransformer', RLSwin, dict(embed_dims=24))])
def test_backbone_that_has_an_rl_class_is_of_that_class(name, cls, kwargs):
    assert type(build_rl_backbone(name, **kwargs, replacement=EVERY_SECOND)) is cls


REFUSED = {
    'neither': (dict(), r"RLBackbone takes either backbone=dict\(type='ResNeSt', ...\) or timm='convnext_tiny'"),
    'both': (dict(backbone='ResNet', timm='resnet18'), 'RLBackbone takes either backbone=.* or timm='),
    'unknown_type': (dict(backbone='ResNest'), "RLBackbone: unknown backbone type 'ResNest'; did you mean .*ResNeSt"),
    'unknown_type_of_another_package': (dict(backbone='mmnothing.ConvNeXt'),
                                        r"unknown backbone type 'mmnothing.ConvNeXt'.*; is its package installed"),
    'no_type': (dict(backbone=dict(depth=50)), 'RLBackbone: backbone must name a type, got None'),
    'given_twice': (dict(backbone=dict(type='ResNeSt', depth=50), depth=101, stem_channels=8),
                    'RLBackbone: depth is given both in backbone and beside it; leave one out'),
    'no_chains_timm': (dict(timm='vgg11', mlp_ratio=0.01, replacement=EVERY_SECOND),
                       'model has no chain of blocks|gives no feature maps of vgg11'),
    'no_chains_mmdet': (dict(backbone='SSDVGG', depth=11, replacement=EVERY_SECOND), 'model has no chain of blocks'),
    'out_indices': (dict(backbone='CSPDarknet', out_indices=(1, 7)), r'CSPDarknet refuses its arguments: .*out_ind'),
    'frozen_stages': (dict(backbone='CSPDarknet', frozen_stages=12), r'frozen_stages must be in range.* received 12'),
    'wrong_plan': (dict(backbone='CSPNeXt', **NEXT, replacement=dict(plan=dict(type='Every'))),
                   r"replacement\.plan: unknown type 'Every'"),
}


@pytest.mark.parametrize(('arguments', 'match'), REFUSED.values(), ids=REFUSED)
def test_bad_argument_raises(arguments, match):
    with pytest.raises(ValueError, match=match):
        build_rl_backbone(**arguments)
