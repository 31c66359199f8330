"""The configs: what they change, what they replace, what they are called, and where they are listed."""
import json
import re
from functools import cache
from pathlib import Path
from unittest.mock import patch

import mmdet
import mmengine
import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [folder for folder in sorted((ROOT / 'configs').iterdir())
           if folder.is_dir() and folder.name not in ('_base_', 'pretrain')]  # for the latter: test_pretraining.py
CONFIGS = [path for folder in FOLDERS for path in sorted(folder.glob('*.py'))]
REPLACED = [path for path in CONFIGS if '_rl-' in path.name]
LEARNED = [path for path in CONFIGS if '_learned-' in path.name]
SWR = [path for path in CONFIGS if '_swr-' in path.name]
ZOO = [folder for folder in FOLDERS if folder.name.startswith('rl_')]
OWN_DATA = [path for path in CONFIGS if path.parent not in ZOO]
NAME = re.compile(
    r'[a-z0-9]+(-[a-z0-9]+)*'                                 # algorithm
    r'_(?P<rl>rl-)?((?P<search>learned|swr)-)?(?P<backbone>[a-z0-9]+(-[a-z0-9]+)*?)(-k(?P<k>\d))?'
    r'(_(simple-)?fpn)?'                                      # neck
    r'(_[a-z0-9]+(-[a-z0-9]+)*)*'                             # settings
    r'_(coco|coco-panoptic|coco-subset|aquarium|bccd|digits|digits-bccd)\.py')     # dataset
TYPES = {'ResNet': 'RLResNet', 'ResNeXt': 'RLResNeXt', 'SwinTransformer': 'RLSwin', 'CSPNeXt': 'RLBackbone',
         'RLViT': 'RLViT', 'MobileNetV2': 'RLBackbone'}
OWN_HOOKS = [dict(type=f'{name}Hook') for name in ('Start', 'LearningSteps', 'FiniteLoss')]
DIFFERENCES = {'custom_imports', 'custom_hooks', 'model.backbone.type', 'model.backbone.replacement',
               'optim_wrapper.constructor'}
UNDER_ANOTHER_TYPE = {'model.backbone.backbone'}  # RLBackbone also says which backbone
FROM_OUR_BASELINE = {'custom_hooks', 'model.backbone.replacement'}  # whose backbone is from rl_mmdet already
# What "every k-th block" means for (backbone, k)
SWIN = {'stages.2.blocks': [1, 3, 5, 7, 9, 11, 13, 15]}
EXPECTED = {
    ('R-34, no frozen stage', 2): {'layer1': [1], 'layer2': [1], 'layer3': [1, 3], 'layer4': [1]},
    ('R-50, no frozen stage', 2): {'layer1': [1], 'layer2': [1], 'layer3': [1, 3], 'layer4': [1]},
    ('R-50', 2): {'layer2': [1], 'layer3': [1, 3], 'layer4': [1]},
    ('R-50', 4): {'layer2': [1], 'layer3': [1], 'layer4': [1]},
    ('R-101, no frozen stage', 2): {'layer1': [1], 'layer2': [1], 'layer3': list(range(1, 22, 2)), 'layer4': [1]},
    ('R-101', 2): {'layer2': [1], 'layer3': [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21], 'layer4': [1]},
    ('R-101', 4): {'layer2': [1], 'layer3': [1, 5, 9, 13, 17, 21], 'layer4': [1]},
    ('X-101-32x4d', 2): {'layer2': [1], 'layer3': list(range(1, 22, 2)), 'layer4': [1]},
    ('X-101-64x4d', 2): {'layer2': [1], 'layer3': list(range(1, 22, 2)), 'layer4': [1]},
    ('Swin-T', 2): {'stages.2.blocks': [1, 3]},
    ('Swin-S', 2): SWIN,
    ('Swin-L', 2): SWIN,
    ('Swin-L, window 12', 2): SWIN,
    ('CSPNeXt-M', 2): {'stage2.1.blocks': [1], 'stage3.1.blocks': [1]},
    ('CSPNeXt-L', 2): {'stage1.1.blocks': [1], 'stage2.1.blocks': [1, 3], 'stage3.1.blocks': [1, 3],
                       'stage4.2.blocks': [1]},
    ('CSPNeXt-X', 2): {'stage1.1.blocks': [1], 'stage2.1.blocks': [1, 3, 5], 'stage3.1.blocks': [1, 3, 5],
                       'stage4.2.blocks': [1]},
    ('MobileNet-V2', 2): {f'layer{stage}': [1] for stage in (3, 4, 5, 6)},
    ('ViT-B', 2): {'blocks': [1, 3, 5, 7, 9]},
    ('ViT-L', 2): {'blocks': list(range(2, 23, 2))},  # global attention is in every sixth block: none is replaced
}


def stem(path):
    return path.stem


@cache
def load(path):
    """A config. MMEngine would read all of MMDetection's metafiles at every ``mmdet::``: once is enough."""
    with patch('mmengine.config.utils.load', read_once):
        return Config.fromfile(path)


@cache
def read_once(path):
    return mmengine.load(path)


def baseline_of(path):
    """The config of the same name without ``rl-`` and ``-k``, or the like: ours beside it, or MMDetection's."""
    plain = re.sub(r'-k\d', '', re.sub('_(rl|learned|swr)-', '_', path.name))
    ours = path.with_name(plain)
    if ours.exists():
        return ours
    [theirs] = (Path(mmdet.__file__).parent / '.mim' / 'configs').glob(f'*/{plain}')
    return theirs


def flat(node, prefix=''):
    """Settings by dotted key. ``_scope_`` is how MMEngine notes that a base came from ``mmdet::``."""
    if prefix in DIFFERENCES | UNDER_ANOTHER_TYPE or not isinstance(node, (dict, list, tuple)):
        return {prefix: node}
    node = node if isinstance(node, dict) else dict(enumerate(node))
    return {key: value for name, child in node.items() if name != '_scope_'
            for key, value in flat(child, f'{prefix}.{name}' if prefix else name).items()}


def called(path):
    """What a config's backbone is called in READMEs and in ``EXPECTED``."""
    backbone = load(path).model.backbone
    match backbone.get('backbone', load(baseline_of(path)).model.backbone.type):
        case 'SwinTransformer':
            name = {(96, 6): 'Swin-T', (96, 18): 'Swin-S', (192, 18): 'Swin-L'}[backbone.embed_dims, backbone.depths[2]]
            return name if backbone.window_size == 7 else f'{name}, window {backbone.window_size}'
        case 'CSPNeXt':
            return {.67: 'CSPNeXt-M', 1: 'CSPNeXt-L', 1.33: 'CSPNeXt-X'}[backbone.deepen_factor]
        case 'MobileNetV2':
            name = 'MobileNet-V2'
        case 'RLViT':
            return {'base': 'ViT-B', 'large': 'ViT-L'}[backbone.arch]
        case 'ResNeXt':
            name = f'X-{backbone.depth}-{backbone.groups}x{backbone.base_width}d'
        case 'ResNet':
            name = f'R-{backbone.depth}'
    return name if backbone.get('frozen_stages', -1) >= 1 else f'{name}, no frozen stage'


def in_names(backbone):
    """How file names spell a backbone: ``r50`` for R-50, and an RTMDet's size alone, as MMDetection does."""
    return re.sub('^([rx])-', r'\1', backbone.partition(',')[0].lower()).removeprefix('cspnext-')


class LinspaceOnCPU(TorchFunctionMode):
    """Swin reads drop-path rates out of a tensor while it is built."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        default = {'device': 'cpu'} if func is torch.linspace else {}
        return func(*args, **default | (kwargs or {}))


@cache
def built(backbone):
    """A backbone from its config as text: without memory for weights, and equal ones once."""
    with torch.device('meta'), LinspaceOnCPU():
        return MODELS.build(dict(json.loads(backbone), init_cfg=None))


def build(path):
    return built(json.dumps(load(path).model.backbone.to_dict()))


def report(path):
    return build(path).replacement_report


def listed(folder):
    """Files that a folder's README links to."""
    return re.findall(r'\]\(([^)/]+\.py)\)', (folder / 'README.md').read_text())


@pytest.mark.parametrize('path', CONFIGS, ids=stem)
def test_config_is_complete_and_its_name_follows_the_convention(path):
    cfg = load(path)
    for key in ('model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator', 'test_evaluator',
                'train_cfg', 'optim_wrapper', 'param_scheduler', 'default_hooks'):
        assert key in cfg
    match = NAME.fullmatch(path.name)
    assert match is not None
    backbone = cfg.model.backbone
    plan = (backbone.get('replacement') or {}).get('plan', {})
    assert (match['rl'] is not None) == (match['k'] is not None) == (plan.get('type') == 'EveryKth')
    assert (match['search'] == 'learned') == (plan.get('type') == 'LearnedPlan')
    assert (match['search'] == 'swr') == ('transfer' in backbone)


@pytest.mark.parametrize('path', REPLACED, ids=stem)
def test_name_says_which_backbone_and_which_plan(path):
    match = NAME.fullmatch(path.name)
    backbone = called(path)
    assert re.sub('-caffe|-p4-w7|-mae', '', match['backbone']) == in_names(backbone)
    assert ('-caffe' in match['backbone']) == (load(path).model.backbone.get('style') == 'caffe')
    offset = dict(offset=0) if backbone == 'ViT-L' else {}
    cfg = load(path).model.backbone
    how = {} if cfg.get('init_cfg') else dict(gradient=dict(mode='coupled'))  # docs/method.md: from scratch
    assert cfg.replacement == dict(plan=dict(type='EveryKth', k=int(match['k']), **offset), **how)


@pytest.mark.parametrize('path', REPLACED, ids=stem)
def test_replaced_config_differs_from_its_baseline_only_in_what_replacement_learning_needs(path):
    cfg, baseline = load(path), load(baseline_of(path))
    ours, theirs = flat(cfg.to_dict()), flat(baseline.to_dict())
    expected = DIFFERENCES
    if ours['model.backbone.type'] == 'RLBackbone':
        expected = DIFFERENCES | UNDER_ANOTHER_TYPE
        assert ours['model.backbone.backbone'] == theirs['model.backbone.type']
    if theirs['model.backbone.type'].startswith('RL'):
        expected = FROM_OUR_BASELINE
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} == expected

    vit = baseline.model.backbone.type == 'RLViT'
    assert cfg.model.backbone.type == TYPES[baseline.model.backbone.type]
    assert cfg.optim_wrapper.constructor == ('RLLayerDecayOptimWrapperConstructor' if vit
                                             else 'RLOptimWrapperConstructor')
    assert cfg.custom_imports == dict(imports=['rl_mmdet'], allow_failed_imports=False)
    assert flat(cfg.custom_hooks) == flat([*baseline.get('custom_hooks', []), *OWN_HOOKS])
    assert report(path).replaced == EXPECTED[called(path), cfg.model.backbone.replacement.plan.k]


@pytest.mark.parametrize('path', LEARNED + SWR, ids=stem)
def test_config_of_a_search_differs_from_its_baseline_only_in_the_search(path):
    ours, baseline = flat(load(path).to_dict()), flat(load(baseline_of(path)).to_dict())
    expected = DIFFERENCES | {'find_unused_parameters'}
    if path in SWR:
        expected = {'custom_imports', 'custom_hooks', 'model.backbone.type', 'model.backbone.transfer.type',
                    'model.backbone.transfer.budget'}
    assert {key for key in ours | baseline if ours.get(key) != baseline.get(key)} == expected
    assert load(path).model.backbone.type == TYPES[load(baseline_of(path)).model.backbone.type]
    hooks = [hook['type'] for hook in load(path).custom_hooks]
    assert hooks == ['StartHook', 'LearningStepsHook', 'FiniteLossHook', 'SearchHook'][2 * (path in SWR):]


@pytest.mark.parametrize('path', [path for path in LEARNED if path.parent.name == 'swr'], ids=stem)
def test_readme_of_learned_plans_says_what_may_be_replaced_and_what_is_left(path):
    cfg = load(path).model.backbone
    backbone = MODELS.build(dict(cfg, init_cfg=None))
    rows = backbone.replacement_report.rows
    budget = f'{100 * cfg.replacement.plan.budget.params:.3g} %'
    line = f'| {sum(row.open for row in rows)} of {len(rows)} blocks | {budget} | 1x | [config]({path.name}) |'
    assert line in (path.parent / 'README.md').read_text()
    every_second = MODELS.build(dict(cfg, init_cfg=None, replacement=dict(plan=dict(type='EveryKth', k=2))))
    plain = MODELS.build(dict(cfg, init_cfg=None, replacement=None))
    left = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (every_second, plain)]
    assert 0 <= cfg.replacement.plan.budget.params - left[0] / left[1] < 0.01


@pytest.mark.parametrize('path', [path for path in CONFIGS if re.search(r'_\d+xb\d', path.name)], ids=stem)
def test_name_says_how_many_gpus_and_images(path):
    gpus, images = map(int, re.search(r'_(\d+)xb(\d+)', path.name).groups())
    cfg = load(path)
    assert cfg.train_dataloader.batch_size == images
    # As MMDetection has it; for RTMDet that is schedule_1x's number, against which its README warns.
    assert cfg.auto_scale_lr.base_batch_size == (16 if path.parent.name == 'rl_rtmdet' else gpus * images)


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


@pytest.mark.parametrize('folder', ZOO, ids=lambda folder: folder.name)
def test_readme_counts_replaced_blocks_and_parameters(folder):
    rows = re.findall(r'\| (\S+(?:, [a-z0-9 ]+)?) \| (\d) \| (\d+ of \d+) \| ([\d.]+ M of [\d.]+ M) \|',
                      (folder / 'README.md').read_text())
    assert len(rows) == len(set(rows))
    counted = set()
    for path in REPLACED:
        if path.parent == folder:
            before = sum(parameter.numel() for parameter in build(baseline_of(path)).parameters())
            after = before - report(path).removed_parameters + report(path).learnable
            blocks = f'{sum(row.replaced for row in report(path).rows)} of {len(report(path).rows)}'
            counted.add((called(path), str(load(path).model.backbone.replacement.plan.k), blocks,
                         f'{after / 1e6:.2f} M of {before / 1e6:.2f} M'))
    assert set(rows) == counted


@pytest.mark.parametrize('folder', ZOO, ids=lambda folder: folder.name)
def test_metafile_lists_every_config_and_claims_nothing(folder):
    meta = yaml.safe_load((folder / 'metafile.yml').read_text())
    [collection] = meta['Collections']
    assert collection['README'] == (folder / 'README.md').relative_to(ROOT).as_posix()
    assert sorted(model['Config'] for model in meta['Models']) == sorted(
        path.relative_to(ROOT).as_posix() for path in folder.glob('*.py'))
    for model in meta['Models']:
        assert model['Name'] == Path(model['Config']).stem
        assert model['In Collection'] == collection['Name']
        assert not {'Results', 'Weights'} & set(model)


def test_model_index_imports_every_metafile_and_names_are_unique():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert index['Import'] == [f'configs/{folder.name}/metafile.yml' for folder in ZOO]
    metas = [yaml.safe_load((ROOT / file).read_text()) for file in index['Import']]
    for names in ([collection['Name'] for meta in metas for collection in meta['Collections']],
                  [model['Name'] for meta in metas for model in meta['Models']]):
        assert len(names) == len(set(names))


@pytest.mark.parametrize('folder', ZOO, ids=lambda folder: folder.name)
def test_commands_in_readme_name_tools_and_configs_that_exist(folder):
    files = re.findall(r'^(?:python|bash) (\S+) (\S+)', (folder / 'README.md').read_text(), re.MULTILINE)
    assert len(files) == 3
    for tool, config in files:
        assert (ROOT / tool).is_file()
        assert (ROOT / config).parent == folder and (ROOT / config).is_file()


@pytest.mark.parametrize('size', ['tiny', 's'])
def test_small_rtmdets_have_no_block_to_replace(size):
    """Their stages have one or two blocks: that is why there are no such configs."""
    baseline = load(Path(mmdet.__file__).parent / f'.mim/configs/rtmdet/rtmdet_{size}_8xb32-300e_coco.py')
    with torch.device('meta'), pytest.raises(ValueError, match='no chain of blocks|replaces no block of this model'):
        MODELS.build(dict(baseline.model.backbone, type='RLBackbone', backbone='CSPNeXt', init_cfg=None,
                          replacement=dict(plan=dict(type='EveryKth', k=2))))
