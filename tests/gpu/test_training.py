"""MMDetection's own training on a GPU with tools/train.py, in mixed precision: a whole run, and one that is resumed."""
import json
import math
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
CONFIG = '''
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', '{root}/configs/_base_/datasets/digits_detection.py',
    '{root}/configs/_base_/schedules/schedule_4e.py', '{root}/configs/_base_/default_runtime.py',
    '{root}/configs/_base_/replacement.py']
model = dict(
    backbone=dict(type='RLResNet', base_channels=8, init_cfg=None, frozen_stages=-1, norm_eval=True),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=50), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50)),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32), mask_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes=10),
        mask_head=dict(in_channels=32, conv_out_channels=32, num_classes=10)))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')]
train_dataloader = dict(batch_size=2, dataset=dict(
    data_root='{folder}/digits/', num_images=20, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root='{folder}/digits/', num_images=2))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='{folder}/digits/annotations/instances_val.json')
test_evaluator = val_evaluator
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=-1))
train_cfg = dict(max_epochs=2)
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
'''
REPLACED = "model['backbone'].update(fold_norm=True, replacement=dict(plan=dict(type='EveryKth', k=2){more}))\n"
SEARCHED = '''
custom_hooks = [dict(type='SearchHook', interval=2), dict(type='StartHook', num_batches=2)]
model['backbone'].update({setting})
'''
RUNS = {
    'RL-v1': REPLACED.format(more=''),
    'RL-v2': REPLACED.format(more=", operator=dict(type='SlimBlock')"),
    'LearnedPlan': SEARCHED.format(
        setting="replacement=dict(plan=dict(type='LearnedPlan', budget=dict(params=0.8), iters=15))"),
    'SWR': SEARCHED.format(setting="transfer=dict(type='SWR', budget=0.1, iters=15)"),
}
"""Two epochs of ten iterations; a search is one of 15, so that it is resumed in its middle."""
ITERATIONS = 20


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Where the data set is made once."""
    return tmp_path_factory.mktemp('training')


def losses(work: Path) -> list[float]:
    """Of every iteration of the last run."""
    path = max(work.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime_ns)
    return [row['loss'] for row in map(json.loads, path.read_text().splitlines()) if 'loss' in row]


@pytest.mark.parametrize('run', RUNS)
def test_mask_rcnn_trains_and_resumes(run, folder, run_script, device, tmp_path):
    config, work = tmp_path / 'mask-rcnn.py', tmp_path / 'work'
    config.write_text(CONFIG.format(root=ROOT, folder=folder) + RUNS[run])
    amp = ['--amp'] if device.type == 'cuda' else []
    for resume, count in (([], ITERATIONS), (['--resume', work / 'epoch_1.pth'], ITERATIONS // 2)):
        name = f'{run}_{count}'  # logs are kept by name
        status, streams = run_script(ROOT / 'tools' / 'train.py', config, '--work-dir', work, *amp, *resume,
                                     '--cfg-options', f'experiment_name={name}', f'visualizer.name={name}')
        assert status == 0, streams.err[-2000:]
        assert len(losses(work)) == count
        assert all(map(math.isfinite, losses(work)))
        saved = torch.load(work / 'epoch_2.pth', map_location='cpu', weights_only=False)
        assert saved['meta']['iter'] == ITERATIONS
        assert all(torch.isfinite(value).all() for value in saved['state_dict'].values())
        (work / 'epoch_2.pth').unlink()
