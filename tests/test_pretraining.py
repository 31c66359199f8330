"""configs/pretrain and docs/pretraining.md: a backbone is pretrained, and goes into a detector as it is.

What trains a classifier needs mmpretrain.
"""
import importlib
import re
import runpy
import shlex
import sys
from collections import OrderedDict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope

from rl_mmdet.engine import UserError, build_model, inspect_training, load_checkpoint_, load_config
from rl_mmdet.models import RLSwin, RLViT, build_rl_backbone
from rl_mmdet.replacement import computing_layers

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'configs' / 'pretrain'
CONFIGS = sorted(FOLDER.glob('*.py'))
REPLACED = [path for path in CONFIGS if path.name.startswith('rl-')]
README = (FOLDER / 'README.md').read_text()
PAGE = (ROOT / 'docs' / 'pretraining.md').read_text().replace('\\\n', ' ')
COMMANDS = re.findall(r'^bash tools/dist_train.sh .*', PAGE, re.MULTILINE)
ROWS = re.findall(r'^\| `(rl-\S+)` \| `(\S+)` \| (?:`(\S+)`)? ?\|', PAGE, re.MULTILINE)
SAMPLE = ('rl-resnet50-k4_8xb32_in1k', 'rl-swin-tiny-k4-slimblock_16xb64_in1k')
SLIM = dict(operator=dict(type='SlimBlock'))
needs_mmpretrain = pytest.mark.skipif(find_spec('mmpretrain') is None, reason='needs mmpretrain')
TINY = '''
_base_ = {base!r}
model = dict(backbone=dict(depth=34, base_channels=4, norm_eval=True, replacement=dict(
    gradient=dict(every=1), plan=dict(_delete_=True, type='EveryKth', k=2))), head=dict(in_channels=32))
loader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(metainfo=dict(classes=('a', 'b'))))
train_dataloader = val_dataloader = test_dataloader = loader
train_cfg = dict(max_epochs=1)
val_evaluator = test_evaluator = dict(topk=1)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
'''


@pytest.fixture(autouse=True)
def same_scope_afterwards(monkeypatch):
    """mmpretrain's scope would stay MMEngine's default for the tests that follow."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict(DefaultScope._instance_dict))


@pytest.fixture
def run_train(run_script):
    return partial(run_script, ROOT / 'tools' / 'train.py')


def baseline_of(path):
    return path.with_name(re.sub('^rl-|-k4|-slimblock', '', path.name))


def flat(node, prefix=''):
    """Settings by dotted key; those of the replacement as one."""
    if prefix == 'model.backbone.replacement' or not isinstance(node, dict):
        return {prefix: node}
    return {key: value for name, child in node.items() if name != '_scope_'
            for key, value in flat(child, f'{prefix}.{name}' if prefix else name).items()}


def layers_of(backbone):
    """What stands where in a backbone: operator and fusion by block."""
    return {name: (repr(layer.operator), repr(layer.fusion)) for name, layer in computing_layers(backbone).items()}


@needs_mmpretrain
@pytest.mark.parametrize('path', [pytest.param(path, id=path.stem, marks=[] if path.stem in SAMPLE
                                               else pytest.mark.slow) for path in REPLACED])
def test_config_replaces_what_its_name_and_the_readme_say_and_changes_nothing_else(path):
    cfg, baseline = load_config(str(path)), load_config(str(baseline_of(path)))
    ours, theirs = flat(cfg._cfg_dict.to_dict()), flat(baseline._cfg_dict.to_dict())
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} <= {
        'custom_imports.imports', 'custom_imports.allow_failed_imports', 'custom_hooks', 'model.backbone.type',
        'model.backbone.backbone', 'model.backbone.norm_eval', 'model.backbone.replacement', 'work_dir',
        'optim_wrapper.constructor'}
    assert ('slimblock' in path.name) == (cfg.model.backbone.replacement.get('operator') == SLIM['operator'])
    model, plain = build_model(cfg).backbone, build_model(baseline).backbone
    report = model.replacement_report
    before = sum(p.numel() for p in plain.parameters())
    after = before - report.removed_parameters + report.learnable
    count = sum(row.replaced for row in report.rows)
    assert (f'| {count} of {len(report.rows)} | {after / 1e6:.2f} M of {before / 1e6:.2f} M | [config]({path.name}) |'
            in README)
    kept = {key for key in plain.state_dict() if not key.startswith(tuple(f'{name}.' for name in layers_of(model)))}
    assert kept <= set(model.state_dict())


def test_readme_lists_every_config():
    listed = re.findall(r'\]\(([^)/]+\.py)\)', README)
    assert sorted(listed) == [path.name for path in CONFIGS]
    assert {baseline_of(path).name for path in REPLACED} < set(listed)


@pytest.mark.parametrize('command', [pytest.param(command, marks=needs_mmpretrain if '/pretrain/' in command else [])
                                     for command in COMMANDS], ids=lambda command: shlex.split(command)[2])
def test_command_is_accepted(command, monkeypatch):
    _, _, config, _, *more = shlex.split(command)
    monkeypatch.setattr(sys, 'argv', ['train.py', config, *more])
    args = runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='parse_only')['parse_args']()
    cfg = load_config(config if '::' in config else str(ROOT / config), args.cfg_options)
    if more:
        init = cfg.model.backbone.init_cfg
        assert init.type == 'Pretrained' and init.prefix == 'backbone.'
        assert any(f'configs/pretrain/{Path(init.checkpoint).parent.name}.py' in other for other in COMMANDS)


@needs_mmpretrain
@pytest.mark.parametrize(('pretrained', 'detector', 'option'), [
    pytest.param(*row, id=row[0], marks=[] if row[0].startswith('rl-swin') else pytest.mark.slow) for row in ROWS])
def test_detector_replaces_the_same_blocks_in_the_same_way(pretrained, detector, option):
    first = build_model(load_config(str(FOLDER / pretrained))).backbone
    key, _, value = option.partition('=')
    options = {key: int(value) if value.isdigit() else value} if option else {}
    cfg = load_config(str(ROOT / 'configs' / detector), options)
    with DefaultScope.overwrite_default_scope('mmdet'):
        second = MODELS.build(dict(cfg.model.backbone, init_cfg=None))
    assert layers_of(first) == layers_of(second) != {}


@needs_mmpretrain
def test_train_an_rl_backbone_and_put_it_into_a_detector(run_train, tiny_config, tmp_path):
    """It begins with a baseline classifier, so that all that can be done to one is."""
    for number in range(8):
        file = tmp_path / 'in1k' / ('train', 'val')[number % 2] / 'ab'[number // 4] / f'{number}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    (tmp_path / 'tiny.py').write_text(TINY.format(base=str(FOLDER / 'rl-resnet50-k4_8xb32_in1k.py')))
    cfg = load_config('tiny.py', {'model.backbone.replacement': None})
    torch.save(build_model(cfg).state_dict(), 'baseline.pth')

    status, output = run_train('tiny.py', '--work-dir', 'work', '--cfg-options', f'data_root={tmp_path}/in1k',
                               'load_from=baseline.pth', 'experiment_name=pretrain')
    assert status == 0, output.err
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    for line in ('backbone.replacement:\n5 of 16 blocks', 'used for initialisation: 5 removed blocks',
                 'recalibrated 10 BatchNorms', 'Epoch(val) [1]'):
        assert line in log

    def detector(replacement=''):
        init = f"init_cfg=dict(type='Pretrained', checkpoint='{tmp_path}/work/epoch_1.pth', prefix='backbone.')"
        return load_config(tiny_config(more=f'model = dict(backbone=dict(base_channels=4, {init}, {replacement}), '
                                            'neck=dict(in_channels=[4, 8, 16, 32]))'))
    _, report = inspect_training(detector())
    assert 'used for initialisation: 0 removed blocks\nmissing: nothing\nleft over: nothing' in report
    backbone = build_model(detector()).backbone
    backbone.init_weights()
    saved = torch.load('work/epoch_1.pth', weights_only=False)['state_dict']
    for key, value in backbone.state_dict().items():
        assert torch.equal(saved[f'backbone.{key}'], value), key
    with pytest.raises(UserError, match=r'^backbone.init_cfg: .*epoch_1.pth: it was saved from a model with another '
                                        r'replacement: layer3.3 is replaced there and kept here\. '):
        inspect_training(detector('replacement=dict(plan=dict(k=4))'))


@needs_mmpretrain
def test_missing_images_are_named_before_anything_is_written(run_train, tmp_path):
    (tmp_path / 'tiny.py').write_text(TINY.format(base=str(FOLDER / 'rl-resnet50-k4_8xb32_in1k.py')))
    status, output = run_train('tiny.py')
    assert status == 1
    assert output.err.splitlines()[-1].startswith('error: train_dataloader.dataset.data_root: data/imagenet/train')
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.py']


def test_without_mmpretrain_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *_: None)
    with pytest.raises(UserError, match=r'mmpretrain is not installed; pip install "rl_mmdet\[pretrain\]"'):
        load_config(str(FOLDER / 'rl-resnet50-k4_8xb32_in1k.py'))


SWIN = dict(embed_dims=12, num_heads=(1, 1, 2, 4))
VIT = dict(embed_dim=24, depth=6, num_heads=2)
MMPRETRAIN_SWIN = dict(backbone='mmpretrain.SwinTransformer', arch=dict(SWIN, depths=[2, 2, 6, 2]))


@pytest.mark.parametrize('more', [{}, SLIM], ids=['FullBlock', 'SlimBlock'])
@pytest.mark.parametrize(('classifier', 'detector'), [
    (partial(RLSwin, **SWIN, out_indices=(3,)), partial(RLSwin, **SWIN)),
    pytest.param(partial(build_rl_backbone, **MMPRETRAIN_SWIN), partial(RLSwin, **SWIN), marks=needs_mmpretrain),
    (partial(build_rl_backbone, timm='vit_base_patch16_224', norm=True, class_token=False, global_pool='avg',
             fc_norm=False, **VIT),
     partial(RLViT, VIT, img_size=64)),
], ids=['swin', 'mmpretrain_swin', 'vit'])
def test_all_that_a_classifier_and_a_detector_share_is_loaded(classifier, detector, more, randomise_, tmp_path):
    replacement = dict(plan=dict(type='EveryKth', k=4), **more)
    first, second = randomise_(classifier(replacement=replacement)), detector(replacement=replacement)
    torch.save({f'backbone.{key}': value for key, value in first.state_dict().items()}, tmp_path / 'first.pth')
    init = dict(checkpoint=str(tmp_path / 'first.pth'), prefix='backbone.')
    report = load_checkpoint_(second, init['checkpoint'], prefix=init['prefix'])
    assert report.initialised == []
    assert all(re.match(r'norm[012]\.|.*\.rel_pos_[hw]$', key) for key in report.missing)
    second.init_cfg = dict(init, type='Pretrained')
    second.init_weights()
    for name, layer in computing_layers(second).items():
        for key, value in layer.named_parameters():
            assert torch.equal(first.get_parameter(f'{name}.{key}'), value)


def test_timms_way_on_the_page_ends_in_both_backbones(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, 'create_model', partial(timm.create_model, channels=(4, 8, 16, 32)))
    script, config = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
    scope = {}
    exec(script, scope)
    for text, width in zip(config.split('backbone = ')[1:], ({}, dict(base_channels=4, stem_channels=64)), strict=True):
        backbone = MODELS.build(eval(text, scope) | width)
        report = load_checkpoint_(backbone, 'rl-resnet50.pth')
        assert (report.missing, report.initialised) == ([], [])
        assert set(layers_of(backbone)) == {'layer2.1', 'layer3.1', 'layer4.1'}
