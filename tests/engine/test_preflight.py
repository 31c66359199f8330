"""Mistakes are found before training, each with one clear line."""
import os

import pytest
import torch
from mmengine.config import Config

from rl_mmdet.engine import UserError, build_model, check_testing, check_training, inspect_training, load_config

K2 = "model = dict(backbone=dict(base_channels=4, replacement=dict({})), neck=dict(in_channels=[4, 8, 16, 32]))"


@pytest.fixture
def tiny(tiny_config, tmp_path):
    def load(more='', name='atss_rl-r34-k2_fpn_digits.py'):
        return load_config(tiny_config(name, more), work_dir=str(tmp_path / 'work'))
    return load


def test_a_good_config_passes_and_reports_the_replacement(tiny):
    found = check_training(tiny())
    assert '5 of 16 blocks replaced' in '\n'.join(found.lines())


@pytest.mark.parametrize(('replacement', 'complaint'), [
    ("plan=dict(_delete_=True, type='EveryThird')", "unknown type 'EveryThird'; allowed: BestFit, Blocks, Budget, "
     'EveryKth, Fraction'),
    ("fusion=dict(type='Sum')", "replacement.fusion: unknown type 'Sum'; allowed: ChannelFusion, OwnWeights, "
     'ScalarFusion, SharedWeights, TransformFusion'),
    ("operator=dict(type='Half')", "replacement.operator: unknown type 'Half'; allowed: DepthwiseBlock, FullBlock, "
     'PooledBlock, Skip, SlimBlock, StochasticDepth'),
    ("gradient=dict(mode='both')", "replacement.gradient: unknown mode 'both'; allowed: detached, coupled"),
    ("plan=dict(type='EveryKth', k=1)", 'k must be an integer of at least 2, got 1'),
    ("plan=dict(_delete_=True, type='Blocks', blocks={'layer9': [1]})", "there is no stage 'layer9'"),
    ("plan=dict(_delete_=True, type='Blocks', blocks={'layer3': [6]})", 'layer3 has no block 6'),
    ("plan=dict(_delete_=True, type='Blocks', blocks={'layer3': [0]})", "layer3 block 0 can't be replaced"),
    ("plan=dict(_delete_=True, type='Blocks', blocks={'layer2': [0, 1, 2, 3]})", "layer2 block 0 can't be replaced"),
    ("plans=dict(k=2)", "unknown setting 'plans'; allowed: plan, fusion, operator, gradient"),
])
def test_a_wrong_replacement_names_setting_and_allowed_values(tiny, tmp_path, replacement, complaint):
    with pytest.raises(UserError) as caught:
        check_training(tiny(K2.format(replacement)))
    assert str(caught.value).startswith('model: replacement')
    assert complaint in str(caught.value)
    assert '\n' not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ['tiny_atss_rl-r34-k2_fpn_digits.py']


def test_missing_annotations_are_named(tiny, tmp_path):
    dataset = f"train_dataloader = dict(dataset=dict(_delete_=True, type='CocoDataset', data_root='{tmp_path}', " \
              "ann_file='annotations/train.json', data_prefix=dict(img='train/')))"
    with pytest.raises(UserError, match=r'annotations/train\.json doesn\'t exist.*data_root=DIR'):
        check_training(tiny(dataset))


def test_a_foreign_file_in_the_way_of_digit_scenes_is_named(tiny, tmp_path):
    (tmp_path / 'digits' / 'annotations').mkdir(parents=True)
    (tmp_path / 'digits' / 'annotations' / 'instances_train.json').write_text('{}')
    with pytest.raises(UserError, match='train_dataloader.dataset: '):
        check_training(tiny())
    assert (tmp_path / 'digits' / 'annotations' / 'instances_train.json').read_text() == '{}'


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


def test_pretrained_backbone_is_checked_and_reported(tiny, tmp_path):
    baseline = build_model(tiny(name='atss_r34_fpn_digits.py'))
    torch.save(baseline.backbone.state_dict(), tmp_path / 'backbone.pth')
    init = f"dict(type='Pretrained', checkpoint='{tmp_path}/backbone.pth')"
    found = check_training(tiny(f"model = dict(backbone=dict(base_channels=4, init_cfg={init}), "
                                "neck=dict(in_channels=[4, 8, 16, 32]))"))
    assert 'used for initialisation: 5 removed blocks' in '\n'.join(found.lines())


def test_inspecting_reports_the_replacement_and_writes_nothing(tiny, tmp_path):
    found = inspect_training(tiny())
    assert '5 of 16 blocks replaced' in '\n'.join(found.lines())
    assert sorted(os.listdir(tmp_path)) == ['tiny_atss_rl-r34-k2_fpn_digits.py']


def test_testing_a_baseline_checkpoint_with_a_replaced_config_is_refused(tiny, tmp_path):
    torch.save(build_model(tiny(name='atss_r34_fpn_digits.py')).state_dict(), tmp_path / 'baseline.pth')
    with pytest.raises(UserError, match="baseline's"):
        check_testing(tiny(), str(tmp_path / 'baseline.pth'))


def test_testing_with_its_own_checkpoint_passes(tiny, tmp_path):
    torch.save(build_model(tiny()).state_dict(), tmp_path / 'own.pth')
    check_testing(tiny(), str(tmp_path / 'own.pth'))


def test_a_config_without_model_is_refused():
    with pytest.raises(UserError, match='no model'):
        build_model(Config(dict(a=1)))


@pytest.mark.parametrize(('more', 'accepted'), [
    ('', False), ("model_wrapper_cfg = dict(type='MMDistributedDataParallel', static_graph=True)", True)])
def test_coupled_checkpointed_blocks_on_several_gpus_need_a_static_graph(tiny, more, accepted):
    cfg = tiny("model = dict(backbone=dict(base_channels=4, with_cp=True, replacement=dict(gradient=dict("
               f"mode='coupled'))), neck=dict(in_channels=[4, 8, 16, 32]))\n{more}")
    check_training(cfg)
    cfg.launcher = 'pytorch'
    if accepted:
        check_training(cfg)
    else:
        with pytest.raises(UserError, match='static_graph=True'):
            check_training(cfg)
