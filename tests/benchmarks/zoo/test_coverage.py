"""Many configs: which they are, which share a model, and the page about all of them."""
import pytest

from rl_mmdet.engine import UserError
from zoo.check import Result
from zoo.configs import ZooConfig, config_names, find_backbones, read_config, with_few_regions
from zoo.coverage import Outcome, require_all
from zoo.page import coverage_page
from zoo.swap import rl_twin, swap_backbones

PLAN = dict(type='EveryKth', k=2)
REPLACEMENT = dict(plan=PLAN, gradient=dict(every=1))


def outcome(name, backbone, *result, **more):
    return Outcome(ZooConfig(name, dict(backbone=dict(type=backbone))), Result(name, *result, **more))


OUTCOMES = [outcome('a/1.py', 'ResNet', 'runs', 'runs', replaced=4),
            outcome('a/2.py', 'ResNet', 'runs', 'fails', 'bad|news'),
            outcome('b/1.py', 'ResNeXt', 'runs', 'no replaceable block', 'says none'),
            outcome('b/2.py', 'ResNeXt', 'fails', reason='needs the package x'),
            outcome('b/3.py', 'ResNeXt', 'fails', reason='needs the package x')]


@pytest.mark.parametrize('line', [
    "Of 5 configs (2 distinct models) 3 run as they are, 2 don't, and 0 weren't tried. With replaced blocks 1 of the 3 "
    'run, 1 have no block that can be replaced, and 1 fail.',
    '| a | 2 | 2 | 1 | 0 | 1 | 1: bad\\|news |', '| b | 3 | 1 | 0 | 1 | 0 | 2: needs the package x |',
    '| ResNet | 2 | 2 | 1 | 0 | 1 | 1: bad\\|news |', '| ResNeXt | 3 | 1 | 0 | 1 | 0 | 2: needs the package x |',
    '- bad\\|news (1): `a/2.py`', '- says none (1): `b/1.py`', '- needs the package x (2): `b/2.py`, `b/3.py`'])
def test_the_page_counts_by_folder_and_backbone_and_lists_by_reason(line):
    assert f'\n{line}\n' in coverage_page(OUTCOMES, 'x')


def test_configs_that_fail_only_with_replaced_blocks_are_an_error():
    with pytest.raises(UserError, match=r'^1 configs run, but not with replaced blocks: a/2.py \(bad\|news\)$'):
        require_all(OUTCOMES)
    require_all(OUTCOMES[2:])


def test_names_are_mmdets_configs_without_bases():
    names = config_names()
    assert len(names) > 500
    assert not [name for name in names if '_base_' in name]
    name = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    assert set(config_names(['ssd/*', name])) == {name, *(each for each in names if each.startswith('ssd/'))}


def test_a_config_is_read_as_the_runner_does_but_loads_nothing_and_shares_its_model_with_other_schedules():
    once, twice, other = (read_config(f'retinanet/retinanet_{name}_coco.py')
                          for name in ('r50_fpn_1x', 'r50_fpn_2x', 'r101_fpn_1x'))
    assert once.model['backbone']['init_cfg'] is None
    assert (once.family, once.backbones) == ('retinanet', 'ResNet')
    assert once.key == twice.key != other.key
    assert read_config('solov2/solov2_r50_fpn_1x_coco.py').model['data_preprocessor']['type'] == 'DetDataPreprocessor'


def test_few_regions_are_never_more():
    model = dict(sampler=dict(num=512), rpn=dict(max_per_img=10, nms_pre=-1), num_classes=80)
    assert with_few_regions(model) == dict(
        sampler=dict(num=32), rpn=dict(max_per_img=10, nms_pre=-1), num_classes=80)


def test_backbones_are_found_and_swapped_where_they_are_nested_but_not_a_teachers():
    model = dict(detector=dict(backbone=dict(type='ResNet', frozen_stages=1)),
                 neck=dict(rfp_backbone=dict(type='HRNet')),
                 teacher_backbone=dict(type='C'), teacher_config=dict(model=dict(backbone=dict(type='D'))))
    assert [backbone['type'] for _, _, backbone in find_backbones(model)] == ['ResNet', 'HRNet']
    swapped = swap_backbones(model, None, PLAN)
    assert swapped['detector'] == model['detector']
    assert swapped['neck']['rfp_backbone'] == dict(type='RLBackbone', backbone='HRNet', replacement=REPLACEMENT)
    assert swap_backbones(model)['detector']['backbone'] == dict(
        type='RLBackbone', backbone='ResNet', frozen_stages=1, replacement=REPLACEMENT)
    assert rl_twin(dict(type='RLResNet', depth=50)) == dict(type='RLResNet', depth=50)
