from copy import deepcopy

import pytest

from rl_mmdet.analysis.zoo import read_config, swap, swap_backbones

PLAN = dict(plan=dict(type='EveryKth', k=2))


@pytest.mark.parametrize(('parent', 'twin'), [
    ('ResNet', 'RLResNet'), ('ResNetV1d', 'RLResNetV1d'), ('ResNeXt', 'RLResNeXt'), ('SwinTransformer', 'RLSwin')])
def test_swap_takes_the_class_made_for_a_backbone_and_keeps_all_other_settings(parent, twin):
    model = dict(type='FCOS', backbone=dict(type=parent, frozen_stages=1), neck=dict(type='FPN'))
    before = deepcopy(model)
    assert swap_backbones(model) == dict(
        type='FCOS', backbone=dict(type=twin, frozen_stages=1, replacement=PLAN), neck=dict(type='FPN'))
    assert model == before


def test_swap_takes_rl_backbone_for_others():
    model = dict(backbone=dict(type='HRNet', extra=dict(stage1=1)))
    assert swap_backbones(model)['backbone'] == dict(
        type='RLBackbone', backbone='HRNet', extra=dict(stage1=1), replacement=PLAN)


def test_swap_finds_nested_backbones():
    model = dict(type='ByteTrack', detector=dict(type='YOLOX', backbone=dict(type='CSPDarknet')))
    assert swap_backbones(model)['detector']['backbone']['type'] == 'RLBackbone'


def test_swap_with_a_plan_for_each_backbone_leaves_those_alone_that_have_none():
    model = dict(backbone=dict(type='ResNet'), neck=dict(rfp_backbone=dict(type='HRNet')))
    plan = dict(type='Blocks', blocks={'layer3': [2]})
    swapped = swap_backbones(model, plan, None)
    assert swapped == dict(backbone=dict(type='RLResNet', replacement=dict(plan=plan)), neck=model['neck'])


def test_plans_that_fit_is_every_other_block_where_that_replaces_any():
    model = read_config('retinanet/retinanet_r50_fpn_1x_coco.py').model
    assert swap.plans_that_fit(model) == [dict(type='EveryKth', k=2)]


def test_plans_that_fit_is_the_first_replaceable_block_otherwise(monkeypatch):
    monkeypatch.setattr(swap, 'EVERY_OTHER', dict(type='EveryKth', k=50, offset=49))
    model = read_config('retinanet/retinanet_r50_fpn_1x_coco.py').model
    assert swap.plans_that_fit(model) == [dict(type='Blocks', blocks={'layer2': [1]})]


def test_plans_that_fit_is_none_where_no_block_can_be_replaced():
    assert swap.plans_that_fit(read_config('retinanet/retinanet_r18_fpn_1x_coco.py').model) == [None]


@pytest.mark.parametrize('backbone', [dict(type='RLResNet', depth=50), dict(type='RLViT', arch='tiny')])
def test_rl_twin_keeps_a_backbone_that_is_one(backbone):
    assert swap.rl_twin(backbone) == backbone
