import pytest

from rl_mmdet.analysis.zoo import ZooConfig, config_names, read_config
from rl_mmdet.analysis.zoo.configs import find_backbones, with_few_regions, without_pretraining
from rl_mmdet.engine import UserError


def test_config_names_are_mmdets_configs_without_bases():
    names = config_names()
    assert len(names) > 500
    assert 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py' in names
    assert not [name for name in names if '_base_' in name]


def test_config_names_by_name_and_glob():
    name = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    assert config_names([name]) == [name]
    names = config_names(['ssd/*', name])
    assert name in names
    assert {each.split('/')[0] for each in names} == {'faster_rcnn', 'ssd'}


def test_config_names_of_an_unknown_pattern_are_a_user_error():
    with pytest.raises(UserError, match=r'--configs nothing/\*: no config of mmdet matches; names look like'):
        config_names(['ssd/*', 'nothing/*'])


def test_read_config_gives_the_model_without_weights_to_load():
    config = read_config('retinanet/retinanet_r50_fpn_1x_coco.py')
    assert config.family == 'retinanet'
    assert config.backbones == 'ResNet'
    assert config.model['type'] == 'RetinaNet'
    assert config.model['backbone']['init_cfg'] is None
    assert config.model['backbone']['frozen_stages'] == 1


def test_read_config_takes_the_data_preprocessor_from_the_top_level_as_the_runner_does():
    assert read_config('centernet/centernet_r18_8xb16-crop512-140e_coco.py').model['data_preprocessor']
    assert read_config('solov2/solov2_r50_fpn_1x_coco.py').model['data_preprocessor']['type'] == 'DetDataPreprocessor'


def test_read_config_says_why_there_is_no_model():
    assert read_config('common/ms_3x_coco.py') == ZooConfig(
        'common/ms_3x_coco.py', reason='holds no model: settings for other configs')


def test_read_config_names_the_missing_package(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("raise ImportError('mmpretrain is not installed, in /some/folder')")
    assert read_config(str(path)).reason == 'needs the package mmpretrain'


def test_key_is_the_same_for_another_schedule_and_another_for_another_model():
    once, twice, other = (read_config(f'retinanet/retinanet_{name}_coco.py').key
                          for name in ('r50_fpn_1x', 'r50_fpn_2x', 'r101_fpn_1x'))
    assert once == twice != other


def test_without_pretraining_empties_every_such_setting_and_copies():
    model = dict(pretrained='a', teacher_ckpt='b', stages=[dict(init_cfg=dict(type='Pretrained')), 3])
    assert without_pretraining(model) == dict(pretrained=None, teacher_ckpt=None, stages=[dict(init_cfg=None), 3])
    assert model['stages'][0]['init_cfg']


def test_with_few_regions_takes_fewer_but_never_more():
    model = dict(sampler=dict(type='RandomSampler', num=512), rpn=dict(max_per_img=10, nms_pre=-1), num_classes=80)
    assert with_few_regions(model) == dict(
        sampler=dict(type='RandomSampler', num=32), rpn=dict(max_per_img=10, nms_pre=-1), num_classes=80)


def test_find_backbones_also_nested_but_not_a_teachers():
    model = dict(detector=dict(backbone=dict(type='A')), neck=dict(rfp_backbone=dict(type='B')),
                 teacher_backbone=dict(type='C'), teacher_config=dict(model=dict(backbone=dict(type='D'))))
    assert [(key, backbone['type']) for _, key, backbone in find_backbones(model)] == [
        ('backbone', 'A'), ('rfp_backbone', 'B')]
    assert ZooConfig('x/y.py', model).backbones == 'A + B'
