"""Mistakes are found before training, each with one clear line."""
import copy
import os
from collections import OrderedDict
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import TRANSFORMS, DefaultScope, init_default_scope

from rl_mmdet.engine import (
    UserError,
    add_rl_defaults_,
    build_model,
    check_testing,
    check_training,
    inspect_training,
    load_config,
)
from rl_mmdet.engine.options import enable_tta_
from rl_mmdet.engine.preflight import checks
from rl_mmdet.engine.preflight.keys import check_keys
from rl_mmdet.engine.preflight.schedule import check_schedule

BASELINE = 'atss_r34_fpn_digits.py'


def backbone(settings):
    """The text of a config that changes the backbone of the tiny one."""
    return f'model = dict(backbone=dict(base_channels=4, {settings}), neck=dict(in_channels=[4, 8, 16, 32]))\n'


@pytest.fixture
def tiny(tiny_config, tmp_path):
    def load(more='', name='atss_rl-r34-k2_fpn_digits.py', launcher='none'):
        return load_config(tiny_config(name, more), None, str(tmp_path / 'work'), launcher)
    return load


def test_inspecting_reports_replacement_and_pretrained_backbone_and_writes_nothing(tiny, tmp_path):
    torch.save(build_model(tiny(name=BASELINE)).backbone.state_dict(), tmp_path / 'backbone.pth')
    cfg = tiny(backbone(f"init_cfg=dict(type='Pretrained', checkpoint='{tmp_path}/backbone.pth')"))
    before = sorted(os.listdir(tmp_path))
    replacement, checkpoint = inspect_training(cfg)
    assert replacement.startswith('backbone.replacement:\n') and '5 of 16 blocks replaced' in replacement
    assert checkpoint.startswith('backbone.init_cfg=') and 'used for initialisation: 5 removed blocks' in checkpoint
    assert sorted(os.listdir(tmp_path)) == before


def test_a_good_config_passes_and_its_data_are_made(tiny, tmp_path):
    check_training(tiny())
    assert (tmp_path / 'digits' / 'annotations' / 'instances_val.json').is_file()
    assert os.listdir(tmp_path / 'work') == []


@pytest.mark.parametrize(('launcher', 'variable'), [('pytorch', 'LOCAL_RANK'), ('slurm', 'SLURM_LOCALID')])
def test_one_process_of_a_machine_tries_the_first_batches(tiny, monkeypatch, launcher, variable):
    tried = []
    monkeypatch.setattr(checks, 'rehearse', lambda *_: tried.append(os.environ[variable]))
    monkeypatch.setenv('LOCAL_RANK', '0')  # which our tools set where no launcher has
    for rank in '01':
        monkeypatch.setenv(variable, rank)
        check_training(tiny(launcher=launcher))
    assert tried == ['0']


@pytest.mark.parametrize(('replacement', 'complaint'), [
    ("plan=dict(_delete_=True, type='EveryThird')", "replacement.plan: unknown type 'EveryThird'; allowed: BestFit, "),
    ("operator=dict(type='Half')", "replacement.operator: unknown type 'Half'; allowed: "),
    ("gradient=dict(mode='both')", "replacement.gradient: unknown mode 'both'; allowed: detached, coupled"),
    ("plan=dict(type='EveryKth', k=1)", 'k must be an integer of at least 2, got 1'),
    ("plan=dict(_delete_=True, type='Blocks', blocks={'layer9': [1]})", "there is no stage 'layer9'"),
    ("plans=dict(k=2)", "unknown setting 'plans'; allowed: plan, fusion, operator, gradient"),
])
def test_a_wrong_replacement_names_setting_and_allowed_values(tiny, tmp_path, replacement, complaint):
    with pytest.raises(UserError) as caught:
        check_training(tiny(backbone(f'replacement=dict({replacement})')))
    assert str(caught.value).startswith('model: replacement')
    assert complaint in str(caught.value)
    assert '\n' not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ['tiny_atss_rl-r34-k2_fpn_digits.py']


def test_missing_annotations_are_named(tiny, tmp_path):
    dataset = f"train_dataloader = dict(dataset=dict(_delete_=True, type='CocoDataset', data_root='{tmp_path}', " \
              "ann_file='annotations/train.json', data_prefix=dict(img='train/')))"
    with pytest.raises(UserError, match=r'train_dataloader.dataset.ann_file: .*annotations/train\.json doesn\'t exist'
                                        '.*data_root=DIR'):
        check_training(tiny(dataset))


def test_a_foreign_file_in_the_way_of_digit_scenes_is_named(tiny, tmp_path):
    path = tmp_path / 'digits' / 'annotations' / 'instances_train.json'
    path.parent.mkdir(parents=True)
    path.write_text('{}')
    with pytest.raises(UserError, match='train_dataloader.dataset: '):
        check_training(tiny())
    assert path.read_text() == '{}'


def test_an_unwritable_work_dir_is_named(tiny, tmp_path):
    (tmp_path / 'work').write_text('a file')
    with pytest.raises(UserError, match='--work-dir .*work'):
        check_training(tiny())
    assert not (tmp_path / 'digits').exists()


def test_load_from_another_architecture_is_refused_before_anything_is_written(tiny, tmp_path):
    torch.save({'backbone.conv1.weight': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(UserError, match='^load_from: .*other.pth'):
        check_training(tiny(f"load_from = '{tmp_path}/other.pth'"))
    assert not (tmp_path / 'work').exists()


def test_a_baseline_cannot_be_resumed_but_loaded(tiny, tmp_path):
    torch.save(build_model(tiny(name=BASELINE)).state_dict(), tmp_path / 'baseline.pth')
    cfg = tiny(f"load_from = '{tmp_path}/baseline.pth'")
    inspect_training(cfg)
    cfg.resume = True
    with pytest.raises(UserError, match=r"resume: .*baseline.pth is a baseline's.* load_from=.*baseline.pth"):
        inspect_training(cfg)


def test_testing_takes_the_models_own_checkpoint_and_refuses_a_baselines(tiny, tmp_path):
    torch.save(build_model(tiny()).state_dict(), tmp_path / 'own.pth')
    check_testing(tiny(), str(tmp_path / 'own.pth'))
    torch.save(dict(list(build_model(tiny()).state_dict().items())[1:]), tmp_path / 'part.pth')
    with pytest.raises(UserError, match='--ignore-keys'):
        check_testing(tiny(), str(tmp_path / 'part.pth'))
    check_testing(tiny(), str(tmp_path / 'part.pth'), ignore_keys=['conv1'])
    torch.save(build_model(tiny(name=BASELINE)).state_dict(), tmp_path / 'baseline.pth')
    with pytest.raises(UserError, match="baseline's"):
        check_testing(tiny(), str(tmp_path / 'baseline.pth'))


def test_a_config_without_model_is_refused():
    with pytest.raises(UserError, match='no model'):
        build_model(Config(dict(a=1)))


def test_coupled_checkpointed_blocks_on_several_gpus_need_a_static_graph(tiny):
    text = backbone("with_cp=True, replacement=dict(gradient=dict(mode='coupled'))")
    inspect_training(tiny(text))
    with pytest.raises(UserError, match='static_graph=True'):
        inspect_training(tiny(text, launcher='pytorch'))
    text += "model_wrapper_cfg = dict(type='MMDistributedDataParallel', static_graph=True)"
    inspect_training(tiny(text, launcher='pytorch'))
    inspect_training(tiny(backbone("replacement=dict(gradient=dict(mode='coupled', recompute=True))"),
                          launcher='pytorch'))


def test_norms_that_are_synchronised_by_mmcv_pass_where_processes_will_be_there(tiny):
    inspect_training(tiny(backbone("norm_cfg=dict(type='MMSyncBN')"), launcher='pytorch'))


def test_data_chosen_by_number_or_by_class_are_taken(tiny):
    check_training(tiny("train_dataloader.update(dataset=dict(indices=[4, 2, 5]), sampler=dict("
                        "_delete_=True, type='ClassAwareSampler', num_sample_class=1))"))


@pytest.mark.parametrize('setting', [
    "strategy = dict(type='FSDPStrategy')", "strategy = dict(type='DeepSpeedStrategy')",
    "model_wrapper_cfg = dict(type='MMFullyShardedDataParallel')"])
def test_weights_in_pieces_are_refused_where_blocks_read_their_neighbours(tiny, setting):
    with pytest.raises(UserError, match='read the weights of the blocks and layers beside them.*Runner and DDP'):
        inspect_training(tiny(setting))
    with pytest.raises(UserError, match='read the weights of the blocks and layers beside them.*Runner and DDP'):
        inspect_training(tiny(backbone('replacement=None, fold_norm=True, norm_eval=True') + setting))
    inspect_training(tiny(setting, name=BASELINE))


def test_classes_of_mmdetection_are_found_before_anything_else_has_set_the_scope(tiny, monkeypatch):
    cfg = tiny("optim_wrapper = dict(constructor='LearningRateDecayOptimizerConstructor')", name=BASELINE)
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())
    inspect_training(cfg)


def test_an_optimizer_whose_checkpoints_hang_is_refused(tiny):
    text = "optim_wrapper = dict(optimizer=dict(type='ZeroRedundancyOptimizer', optimizer_type='AdamW'))"
    with pytest.raises(UserError, match="ZeroRedundancyOptimizer.*hangs.*optimizer_type"):
        inspect_training(tiny(text))


@pytest.mark.parametrize('scope', ['mmpretrain', 'nowhere'])
def test_a_project_with_a_scope_of_its_own_passes_also_with_test_time_augmentation(check, parsed, scope):
    assert check(dict(default_scope=scope))
    cfg = copy.deepcopy(parsed)
    enable_tta_(cfg)
    with DefaultScope.overwrite_default_scope(scope):
        transforms = TRANSFORMS.build(cfg.test_dataloader.dataset.pipeline[-1]).subroutines[0].transforms
    assert [type(each).__module__.partition('.')[0] for each in transforms] == ['mmdet', 'mmdet']


def test_a_variable_that_the_model_was_made_of_may_differ_from_it(check):
    """As MMDetection's semi-supervised configs have a ``detector``, of which a child changes the model's copy."""
    assert check(dict(neck=dict(type='FPN', in_channels=[1])))[-1] == 'settings that nobody reads: data_root, neck'


INCOMPLETE = {'clrnet.py', 'qdtrack_faster-rcnn_r50_fpn_4e_base.py', 'ga-fast-rcnn_r50-caffe_fpn_1x_coco.py'}
"""Configs of MMDetection that it can't train either."""


@pytest.mark.slow
def test_nothing_in_mmdetections_own_configs_is_taken_for_a_mistake():
    init_default_scope('mmdet')
    folder = Path(mmdet.__file__).parent / '.mim' / 'configs'
    paths = [path for path in sorted(folder.glob('*/*.py')) if path.parent.name != '_base_']
    refused, checked = {}, 0
    for path in paths:
        try:
            cfg = add_rl_defaults_(load_config(str(path)))
        except UserError:  # it needs a package, or another config, that isn't here
            continue
        checked += 1
        try:
            check_keys(cfg)
            check_schedule(cfg)
        except UserError as error:
            refused[path.name] = str(error)
    assert checked > 500
    assert refused.keys() <= INCOMPLETE, refused
