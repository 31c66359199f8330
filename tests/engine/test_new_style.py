"""MMEngine's new style of configs, where types are classes: all that holds for their names holds for them."""

import pytest
import torch
from mmengine.config import Config

from rl_mmdet.analysis.compare.same_question import check_same_question
from rl_mmdet.engine import (
    UserError,
    add_rl_defaults_,
    build_model,
    build_runner,
    check_training,
    inspect_training,
    load_config,
)
from rl_mmdet.models import RLResNet

BASE = '''
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import LinearLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, LogProcessor, TestLoop, ValLoop
from mmengine.visualization import LocalVisBackend
from torch.optim import SGD
from mmcv.ops import nms
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, RandomFlip, Resize
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.evaluation import CocoMetric
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, PseudoSampler
from mmdet.models import FPN, DetDataPreprocessor, FocalLoss, L1Loss, RetinaHead, RetinaNet
from mmdet.visualization import DetLocalVisualizer
from rl_mmdet.datasets import DigitScenesDataset
from rl_mmdet.models import RLResNet
from rl_mmdet.replacement.plans import EveryKth
default_scope = None
default_hooks = dict(
    timer=dict(type=IterTimerHook), logger=dict(type=LoggerHook, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook), checkpoint=dict(type=CheckpointHook, interval=1),
    sampler_seed=dict(type=DistSamplerSeedHook), visualization=dict(type=DetVisualizationHook))
visualizer = dict(type=DetLocalVisualizer, vis_backends=[dict(type=LocalVisBackend)], name='visualizer')
log_processor = dict(type=LogProcessor, window_size=50, by_epoch=True)
model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor, mean=[0., 0., 0.], std=[255., 255., 255.], pad_size_divisor=32),
    backbone=dict(type=RLResNet, depth=34, base_channels=4, norm_eval=True,
                  replacement=dict(plan=dict(type=EveryKth, k=2))),
    neck=dict(type=FPN, in_channels=[4, 8, 16, 32], out_channels=8, num_outs=5),
    bbox_head=dict(
        type=RetinaHead, num_classes=10, in_channels=8, feat_channels=8, stacked_convs=1,
        anchor_generator=dict(type=AnchorGenerator, octave_base_scale=4, scales_per_octave=3, ratios=[1.],
                              strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder), loss_cls=dict(type=FocalLoss, use_sigmoid=True),
        loss_bbox=dict(type=L1Loss)),
    train_cfg=dict(assigner=dict(type=MaxIoUAssigner, pos_iou_thr=.5, neg_iou_thr=.4, min_pos_iou=0, ignore_iof_thr=-1),
                   sampler=dict(type=PseudoSampler), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=.05, nms=dict(type=nms, iou_threshold=.5), max_per_img=10))
data_root = 'DIGITS/'
pipeline = [dict(type=LoadImageFromFile), dict(type=LoadAnnotations, with_bbox=True),
            dict(type=Resize, scale=(64, 64)), dict(type=RandomFlip, prob=.5), dict(type=PackDetInputs)]
test_pipeline = [dict(type=LoadImageFromFile), dict(type=Resize, scale=(64, 64), keep_ratio=True),
                 dict(type=LoadAnnotations, with_bbox=True),
                 dict(type=PackDetInputs, meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
digits = dict(type=DigitScenesDataset, data_root=data_root, image_size=(64, 64))
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=True),
                        dataset=dict(split='train', num_images=4, pipeline=pipeline, **digits))
val_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=False),
                      dataset=dict(split='val', num_images=2, pipeline=test_pipeline, test_mode=True, **digits))
test_dataloader = val_dataloader
val_evaluator = dict(type=CocoMetric, ann_file=data_root + 'annotations/instances_val.json', metric='bbox')
test_evaluator = val_evaluator
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=2, val_interval=2)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=.01, momentum=.9, weight_decay=1e-4))
param_scheduler = [dict(type=LinearLR, start_factor=.1, by_epoch=False, begin=0, end=4)]
'''
CONFIG = '''
from mmengine.config import read_base
with read_base():
    from .base import *
from mmcv.ops import RoIAlign
from mmengine.hooks import EMAHook
from mmengine.model import PretrainedInit
from rl_mmdet.engine.hooks import FiniteLossHook
from rl_mmdet.search import LearnedPlan
custom_hooks = [dict(type=FiniteLossHook)]
MORE
'''
SEARCH = 'model.backbone.replacement = dict(plan=dict(type=LearnedPlan, budget=dict(params=.8), epochs=1))'
ADDED = ['FiniteLossHook', 'ResumeHook', 'StartHook', 'LearningStepsHook', 'SearchHook']


@pytest.fixture
def config(tmp_path):
    """Read a config with some text at its end."""
    def read(more: str = '', **options: object) -> Config:
        (tmp_path / 'base.py').write_text(BASE.replace('DIGITS', str(tmp_path / 'digits')))
        (tmp_path / 'new_style.py').write_text(CONFIG.replace('MORE', more))
        return load_config(str(tmp_path / 'new_style.py'), options, work_dir=str(tmp_path / 'work'))
    return read


def test_a_search_trains_and_leaves_configs_that_can_be_read(config, tmp_path):
    cfg = add_rl_defaults_(add_rl_defaults_(config(SEARCH)))
    assert [getattr(hook.type, '__name__', hook.type) for hook in cfg.custom_hooks] == ADDED
    assert cfg.default_hooks.checkpoint.type == 'WholeCheckpointHook'
    texts = check_training(cfg)
    assert not any('nobody reads' in text for text in texts)
    build_runner(cfg, texts).train()
    state = torch.load(tmp_path / 'work' / 'epoch_2.pth', weights_only=False)['state_dict']
    found = load_config(str(tmp_path / 'work' / 'new_style_found.py'), work_dir=str(tmp_path / 'again'))
    build_model(found).load_state_dict(state)
    dumped = load_config(str(tmp_path / 'work' / 'new_style.py'), work_dir=str(tmp_path / 'again'))
    check_training(dumped)
    check_same_question(dict(baseline=config(), variant=dumped))


def test_weights_of_another_model_are_refused(config, tmp_path):
    torch.save(RLResNet(depth=34, base_channels=8).state_dict(), tmp_path / 'wrong.pth')
    with pytest.raises(UserError, match="wrong.pth: 180 tensors don't fit the model"):
        inspect_training(config(
            f"model.backbone.init_cfg = dict(type=PretrainedInit, checkpoint='{tmp_path}/wrong.pth')"))


@pytest.mark.parametrize('dumped', [False, True])
def test_what_is_known_by_its_plain_name_alone_has_it(config, tmp_path, dumped):
    """Also where MMEngine has dumped it by module and name."""
    cfg = config("model.backbone.init_cfg = dict(type=PretrainedInit, checkpoint='x')\nroi = dict(type=RoIAlign)")
    if dumped:
        Config.fromfile(tmp_path / 'new_style.py').dump(tmp_path / 'dumped.py')
        cfg = load_config(str(tmp_path / 'dumped.py'))
    assert [cfg.model.backbone.init_cfg.type, cfg.model.test_cfg.nms.type, cfg.roi.type] == [
        'Pretrained', 'nms', 'RoIAlign']


def test_a_class_that_is_not_there_is_named_in_one_line(config):
    with pytest.raises(UserError, match='ImportError: Failed to import Nothing from mmdet.models') as caught:
        config('from mmdet.models import Nothing\nmodel.neck.type = Nothing')
    assert '\n' not in str(caught.value)
