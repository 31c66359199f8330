"""The tools with a plan that is learned: train, test, materialize, compare what it costs."""
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer
from mmengine.config import Config

from rl_mmdet.analysis.compare.costs import measure_costs
from rl_mmdet.engine import load_config

EPOCHS = 4
"""Of two iterations; the search is the first half."""
LEARNED = '''
plan = dict(_delete_=True, type='LearnedPlan', budget=dict(params=0.8))
model = dict(backbone=dict(base_channels=4, replacement=dict(plan=plan)), neck=dict(in_channels=[4, 8, 16, 32]),
             test_cfg=dict(score_thr=0., max_per_img=20))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=-1))
train_dataloader['dataset']['num_images'] = 4
train_cfg = dict(max_epochs=4, val_begin=9)
'''
"""Every prediction counts, so that a detector that has learned nothing shows what it computes."""
BASELINE = '''
model = dict(backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16, 32]),
             test_cfg=dict(score_thr=0., max_per_img=20))
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('search')


@pytest.fixture(scope='module')
def config(write_tiny_config, folder) -> str:
    return write_tiny_config(folder, 'atss_rl-r34-k2_fpn_digits.py', LEARNED)


@pytest.fixture
def whole(run_tool, config, folder) -> Path:
    """The work dir of a training."""
    work = folder / 'whole'
    if not work.exists():
        status, captured = run_tool('train')(config, '--work-dir', work)
        assert status == 0, captured.err[-2000:]
    return work


@pytest.fixture
def predict(run_tool, tmp_path) -> Callable[..., list]:
    """tools/test.py; the detections and the AP."""
    def run(config: str | Path, checkpoint: str | Path, *options: str) -> tuple[list, float]:
        out = tmp_path / f'{len(list(tmp_path.iterdir()))}.pkl'
        work = out.with_suffix('')
        status, captured = run_tool('test')(config, checkpoint, '--work-dir', work, '--out', out, '--cfg-options',
                                            f'experiment_name={tmp_path.name}_{out.stem}',
                                            f'visualizer.name={tmp_path.name}_{out.stem}', *options)
        assert status == 0, captured.err[-2000:]
        found = [sample['pred_instances'] for sample in pickle.loads(out.read_bytes())]
        assert all(len(sample['scores']) for sample in found)
        [scores] = [json.loads(file.read_text()) for file in work.glob('*/*.json')]
        return found, scores['coco/bbox_mAP']
    return run


def found_config(work: Path, config: str) -> Path:
    return work / f'{Path(config).stem}_found.py'


def plan(work: Path, config: str) -> dict:
    return Config.fromfile(found_config(work, config)).model.backbone.replacement.plan.to_dict()


def assert_same_predictions(one: list, other: list, **tolerance: float) -> None:
    for mine, others in zip(one, other, strict=True):
        assert mine.keys() == others.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, others[name], **(tolerance or dict(rtol=0, atol=0)))


def test_a_trained_search_is_tested_by_its_own_and_by_the_found_config_and_materialized(
        whole, config, predict, run_tool, write_tiny_config, tmp_path):
    checkpoint = whole / f'epoch_{EPOCHS}.pth'
    own, score = predict(config, checkpoint)
    found, same_score = predict(found_config(whole, config), checkpoint)
    assert_same_predictions(own, found)
    assert score == same_score
    status, captured = run_tool('materialize')(config, checkpoint, tmp_path / 'plain.pth')
    assert status == 0, captured.err[-2000:]
    assert f'{sum(map(len, plan(whole, config)["blocks"].values()))} computing layers are plain blocks' in captured.out
    baseline = write_tiny_config(tmp_path, 'atss_r34_fpn_digits.py', BASELINE)
    plain, _ = predict(baseline, tmp_path / 'plain.pth', f'data_root={Path(config).parent}/digits/')
    assert_same_predictions(plain, own, rtol=1e-3, atol=1e-3)


def test_without_our_tools_the_checkpoint_alone_is_the_found_model(whole, config):
    """MMDetection's own way to use a file builds the config in it."""
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    last = str(whole / f'epoch_{EPOCHS}.pth')
    alone, found = (DetInferencer(model, last, 'cpu', show_progress=False)(picture)['predictions']
                    for model in (None, str(found_config(whole, config))))
    assert alone == found
    assert alone[0]['scores']


def test_what_was_saved_during_the_search_is_not_materialized(whole, config, run_tool, tmp_path):
    status, captured = run_tool('materialize')(config, whole / 'epoch_1.pth', 'plain.pth')
    assert status == 1
    [line] = [line for line in captured.err.splitlines() if line.startswith('error: ')]
    assert 'epoch_1.pth' in line and 'finish the search first' in line
    assert list(tmp_path.iterdir()) == []


def test_the_cost_of_a_plan_is_known_when_it_has_been_found(whole, config, write_tiny_config, tmp_path):
    baseline = write_tiny_config(tmp_path, 'atss_r34_fpn_digits.py', BASELINE)
    cfgs = {'baseline': load_config(baseline, dict(data_root=str(Path(config).parent / 'digits'))),
            'learned': load_config(config), 'searching': load_config(config)}
    last = whole / f'epoch_{EPOCHS}.pth'
    costs = measure_costs(cfgs, {'learned': last, 'searching': whole / 'epoch_1.pth'}, 1, say=lambda line: None)
    assert costs['searching'] == 'what it costs is not known before its search has found a plan; train it first'
    assert 0.5 < costs['learned'].trainable / costs['baseline'].trainable < 1
