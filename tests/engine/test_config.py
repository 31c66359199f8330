"""Reading a config with its options, and the defaults for Replacement Learning."""
import pytest
from mmengine.config import Config

from rl_mmdet.engine import UserError, add_rl_defaults_, load_config


def config_file(tmp_path, text):
    path = tmp_path / 'some_config.py'
    path.write_text(text)
    return str(path)


def test_load_config_without_work_dir_takes_the_config_stem(tmp_path):
    cfg = load_config(config_file(tmp_path, 'a = 1'))
    assert cfg.work_dir == 'work_dirs/some_config'


def test_load_config_missing_file_names_it(tmp_path):
    with pytest.raises(UserError, match='nothing.py'):
        load_config(str(tmp_path / 'nothing.py'))


def test_load_config_with_python_error_is_one_line(tmp_path):
    with pytest.raises(UserError, match='SyntaxError') as caught:
        load_config(config_file(tmp_path, 'a = ('))
    assert '\n' not in str(caught.value)


def test_data_root_option_moves_datasets_and_evaluators(tmp_path):
    path = config_file(tmp_path, '''
data_root = 'data/coco/'
train_dataloader = dict(dataset=dict(dataset=dict(data_root=data_root, ann_file='annotations/train.json')))
val_evaluator = dict(ann_file=data_root + 'annotations/val.json', outfile_prefix='./work/data/coco/x')
''')
    cfg = load_config(path, {'data_root': '/elsewhere'})
    assert cfg.train_dataloader.dataset.dataset.data_root == '/elsewhere/'
    assert cfg.train_dataloader.dataset.dataset.ann_file == 'annotations/train.json'
    assert cfg.val_evaluator.ann_file == '/elsewhere/annotations/val.json'
    assert cfg.val_evaluator.outfile_prefix == './work/data/coco/x'


def test_data_root_option_without_data_root_in_the_config_is_refused(tmp_path):
    with pytest.raises(UserError, match='no top-level data_root'):
        load_config(config_file(tmp_path, 'a = 1'), {'data_root': 'x'})


def rl_config(**more):
    return Config(dict(model=dict(backbone=dict(type='RLResNet', replacement=dict(plan=dict(type='EveryKth', k=2)))),
                       optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=.1)), **more))


def test_rl_defaults_add_hooks_and_constructor_to_a_replaced_model():
    cfg = add_rl_defaults_(rl_config(custom_hooks=[dict(type='FiniteLossHook'), dict(type='Other')]))
    assert [hook.type for hook in cfg.custom_hooks] == ['FiniteLossHook', 'Other', 'RecalibrateNormsHook',
                                                        'LogCoefficientsHook']
    assert cfg.optim_wrapper.constructor == 'RLOptimWrapperConstructor'


def test_rl_defaults_leave_a_baseline_its_constructor():
    cfg = rl_config()
    cfg.model.backbone.replacement = None
    add_rl_defaults_(cfg)
    assert [hook.type for hook in cfg.custom_hooks] == ['FiniteLossHook']
    assert 'constructor' not in cfg.optim_wrapper


def test_rl_defaults_respect_another_constructor():
    cfg = rl_config()
    cfg.optim_wrapper.constructor = 'LayerDecay'
    assert add_rl_defaults_(cfg).optim_wrapper.constructor == 'LayerDecay'


def test_a_config_of_mmdetection_is_found_by_the_name_it_has_as_a_base():
    cfg = load_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', {'model.backbone.depth': 18})
    assert (cfg.model.backbone.type, cfg.model.backbone.depth) == ('ResNet', 18)
    assert cfg.work_dir == 'work_dirs/faster-rcnn_r50_fpn_1x_coco'


def test_a_config_that_mmdetection_does_not_have_is_refused_in_one_line():
    with pytest.raises(UserError, match='config mmdet::faster_rcnn/nothing.py: ') as error:
        load_config('mmdet::faster_rcnn/nothing.py')
    assert '\n' not in str(error.value)
