"""The configs: what they change, what they replace, what they are called, and where they are listed."""
import re
from functools import cache
from pathlib import Path

import mmdet
import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [folder for folder in sorted((ROOT / 'configs').iterdir()) if folder.is_dir() and folder.name != '_base_']
CONFIGS = [path for folder in FOLDERS for path in sorted(folder.glob('*.py'))]
REPLACED = [path for path in CONFIGS if '_rl-' in path.name]
OWN_DATA = [path for path in CONFIGS if path.parent.name != 'rl_resnet']
NAME = re.compile(
    r'[a-z0-9]+(-[a-z0-9]+)*'                                # algorithm
    r'_((r\d+(-caffe)?)|(rl-r(?P<depth>\d+)(-caffe)?-k(?P<k>\d)))'  # backbone
    r'_fpn'                                                  # neck
    r'(_[a-z0-9]+(-[a-z0-9]+)*)*'                            # settings
    r'_(coco|coco-subset|bccd|digits)\.py')                  # dataset
DIFFERENCES = {'custom_imports', 'custom_hooks', 'model.backbone.type', 'model.backbone.replacement',
               'optim_wrapper.constructor'}
# What "every k-th block" means for (depth, k, whether the first stage is frozen)
EXPECTED = {
    (34, 2, False): {'layer1': [1], 'layer2': [1], 'layer3': [1, 3], 'layer4': [1]},
    (50, 2, False): {'layer1': [1], 'layer2': [1], 'layer3': [1, 3], 'layer4': [1]},
    (50, 2, True): {'layer2': [1], 'layer3': [1, 3], 'layer4': [1]},
    (50, 4, True): {'layer2': [1], 'layer3': [1], 'layer4': [1]},
    (101, 2, True): {'layer2': [1], 'layer3': [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21], 'layer4': [1]},
    (101, 4, True): {'layer2': [1], 'layer3': [1, 5, 9, 13, 17, 21], 'layer4': [1]},
}


def stem(path):
    return path.stem


@cache
def load(path):
    return Config.fromfile(path)


def baseline_of(path):
    """The config of the same name without ``rl-`` and ``-k``: ours beside it, or MMDetection's."""
    plain = re.sub(r'-k\d', '', path.name.replace('_rl-', '_'))
    ours = path.with_name(plain)
    if ours.exists():
        return ours
    [theirs] = (Path(mmdet.__file__).parent / '.mim' / 'configs').glob(f'*/{plain}')
    return theirs


def flat(node, prefix=''):
    """Settings by dotted key. ``_scope_`` is how MMEngine notes that a base came from ``mmdet::``."""
    if prefix in DIFFERENCES or not isinstance(node, (dict, list, tuple)):
        return {prefix: node}
    node = node if isinstance(node, dict) else dict(enumerate(node))
    return {key: value for name, child in node.items() if name != '_scope_'
            for key, value in flat(child, f'{prefix}.{name}' if prefix else name).items()}


@cache
def replaced_blocks(backbone):
    """What a backbone's config, as text, replaces; built without memory for weights, and equal ones once."""
    cfg = Config.fromstring(backbone, '.py').backbone
    with torch.device('meta'):
        return MODELS.build(dict(cfg, init_cfg=None)).replacement_report


def report(path):
    return replaced_blocks(Config(dict(backbone=load(path).model.backbone)).pretty_text)


def listed(folder):
    """Files that a folder's README links to."""
    return re.findall(r'\]\(([^)/]+\.py)\)', (folder / 'README.md').read_text())


@pytest.mark.parametrize('path', CONFIGS, ids=stem)
def test_config_has_a_model_data_and_a_schedule(path):
    cfg = load(path)
    for key in ('model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator', 'test_evaluator',
                'train_cfg', 'optim_wrapper', 'param_scheduler', 'default_hooks'):
        assert key in cfg


@pytest.mark.parametrize('path', CONFIGS, ids=stem)
def test_name_follows_the_convention(path):
    match = NAME.fullmatch(path.name)
    backbone = load(path).model.backbone
    assert match is not None
    assert (match['k'] is not None) == ('replacement' in backbone)
    if match['k']:
        assert backbone.depth == int(match['depth'])
        assert backbone.replacement == dict(plan=dict(type='EveryKth', k=int(match['k'])))


@pytest.mark.parametrize('path', REPLACED, ids=stem)
def test_replaced_config_differs_from_its_baseline_only_in_the_replacement(path):
    ours, baseline = flat(load(path).to_dict()), flat(load(baseline_of(path)).to_dict())
    assert {key for key in ours | baseline if ours.get(key) != baseline.get(key)} == DIFFERENCES


@pytest.mark.parametrize('path', REPLACED, ids=stem)
def test_replaced_config_has_what_replacement_learning_needs(path):
    cfg = load(path)
    assert cfg.model.backbone.type == 'RLResNet'
    assert cfg.optim_wrapper.constructor == 'RLOptimWrapperConstructor'
    assert [hook.type for hook in cfg.custom_hooks] == ['RecalibrateNormsHook', 'FiniteLossHook']


@pytest.mark.parametrize('path', REPLACED, ids=stem)
def test_backbone_replaces_every_kth_block(path):
    backbone = load(path).model.backbone
    key = backbone.depth, backbone.replacement.plan.k, backbone.frozen_stages >= 1
    assert report(path).replaced == EXPECTED[key]


@pytest.mark.parametrize('path', OWN_DATA, ids=stem)
def test_data_root_is_the_one_place_that_says_where_the_data_are(path):
    cfg = load(path)
    for phase in ('train', 'val', 'test'):
        assert cfg[f'{phase}_dataloader'].dataset.data_root == cfg.data_root
    for phase in ('val', 'test'):
        assert cfg[f'{phase}_evaluator'].ann_file.startswith(cfg.data_root + 'annotations/')


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
def test_readme_lists_every_config_of_its_folder(folder):
    assert sorted(listed(folder)) == sorted(path.name for path in folder.glob('*.py'))


def test_readme_counts_replaced_blocks_and_parameters():
    rows = re.findall(r'\| (R-\d+) \| (\d) \| (\d+) of (\d+) \| ([\d.]+) M of ([\d.]+) M \|',
                      (ROOT / 'configs/rl_resnet/README.md').read_text())
    assert len(rows) == 4
    for backbone, k, replaced, blocks, ours, baseline in rows:
        path = ROOT / f'configs/rl_resnet/faster-rcnn_rl-{backbone.replace("-", "").lower()}-k{k}_fpn_1x_coco.py'
        counted = report(path)
        with torch.device('meta'):
            plain = MODELS.build(dict(load(baseline_of(path)).model.backbone, init_cfg=None))
        before = sum(parameter.numel() for parameter in plain.parameters())
        after = before - counted.removed_parameters + counted.learnable
        assert (int(replaced), int(blocks)) == (sum(row.replaced for row in counted.rows), len(counted.rows))
        assert (ours, baseline) == (f'{after / 1e6:.2f}', f'{before / 1e6:.2f}')


def test_metafile_lists_every_config_and_claims_nothing():
    folder = ROOT / 'configs/rl_resnet'
    meta = yaml.safe_load((folder / 'metafile.yml').read_text())
    [collection] = meta['Collections']
    assert (ROOT / collection['README']).is_file()
    assert sorted(model['Config'] for model in meta['Models']) == sorted(
        path.relative_to(ROOT).as_posix() for path in folder.glob('*.py'))
    for model in meta['Models']:
        assert model['Name'] == Path(model['Config']).stem
        assert model['In Collection'] == collection['Name']
        assert not {'Results', 'Weights'} & set(model)
