"""README.md, CONTRIBUTING.md and docs: tools accept the commands, configs load, links lead somewhere."""
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import mmdet
import mmengine
import pytest
import torch
from mmdet.models.backbones.resnet import Bottleneck
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

import rl_mmdet_cli
from rl_mmdet.engine import check_training, load_config
from rl_mmdet.engine.preflight import check_data
from rl_mmdet.replacement import OPERATORS, computing_layers, materialize, replace_blocks_

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md', *ROOT.glob('docs/*.md'),
                      *ROOT.glob('docs/api/*.md'), ROOT / 'docs/results/README.md', *ROOT.glob('configs/*/README.md')]}
BLOCKS = [(page, kind, block) for page, text in PAGES.items()
          for kind, block in re.findall(r'^```(\w+)\n(.*?)^```', text, re.DOTALL | re.MULTILINE)]
LINES = [(page, line) for page, kind, block in BLOCKS if kind == 'bash'
         for line in block.replace('\\\n', ' ').splitlines()]
COMMAND = re.compile(r'(?:[A-Z_]+=\S+ )*((?:python|bash) tools/.*)')
SUBCOMMAND = re.compile(r'rl-mmdet (\w+)')
COMMANDS = sorted({(page, match[1]) for page, line in LINES if (match := COMMAND.match(SUBCOMMAND.sub(
    lambda match: f'python tools/{rl_mmdet_cli.COMMANDS[match[1]][0]}.py', line)))})
README_COMMANDS = [command for page, command in COMMANDS if page == 'README.md' and 'init.py' not in command]
ON_SHARED_DATA = [command for _, command in COMMANDS if '../shared' in command]
CONFIGS = [block for _, kind, block in BLOCKS if kind == 'python' and re.match(r'_base_ = .mmdet::', block)]


read_once = cache(mmengine.load)


@pytest.fixture(autouse=True)
def metafiles_read_once(monkeypatch):
    """MMEngine would read all of MMDetection's metafiles at every ``mmdet::``."""
    monkeypatch.setattr('mmengine.config.utils.load', read_once)


def parse(command, monkeypatch):
    """Let a tool parse the command's arguments; a shell launcher's are those of the Python tool it starts."""
    tool, *words = shlex.split(command, comments=True)[1:]
    if 'slurm_' in tool:  # PARTITION JOB CONFIG WORK_DIR
        words = [words[2], '--work-dir', words[3], *words[4:]]
    elif 'dist_train' in tool:  # CONFIG GPUS
        del words[1]
    elif 'dist_test' in tool:  # CONFIG CHECKPOINT GPUS
        del words[2]
    tool = re.sub(r'(dist|slurm)_(\w+)\.sh', r'\2.py', tool)
    monkeypatch.setattr(sys, 'argv', [tool, *words])
    return runpy.run_path(str(ROOT / tool), run_name='parse_only')['parse_args']()


def configs_of(args):
    """The config files that a command names."""
    given = getattr(args, 'configs', None) or [getattr(args, 'config', None) or '']
    return [name.partition('=')[2] or name for name in given]


def is_there(config):
    """Whether a config is a file of ours or of MMDetection's."""
    package, _, name = config.rpartition('::')
    return ((Path(mmdet.__file__).parent / '.mim' / 'configs' if package else ROOT) / name).is_file()


def anchors(text):
    """The anchors that GitHub and MyST give a page's headings."""
    headings = re.findall(r'^#+ (.*)', re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def build_backbone(cfg):
    return MODELS.build(dict(cfg.model.backbone, init_cfg=None))


def test_readme_is_short():
    lines = PAGES['README.md'].splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_readme_and_docs_have_commands_for_every_tool():
    used = {shlex.split(command, comments=True)[1] for _, command in COMMANDS}
    assert used == {path.relative_to(ROOT).as_posix() for path in (ROOT / 'tools').iterdir()
                    if path.suffix in ('.py', '.sh')} - {'tools/demo.py', 'tools/slurm_test.sh'}


@pytest.mark.parametrize(('page', 'command'), COMMANDS)
def test_command_is_accepted_and_its_configs_are_there(page, command, monkeypatch):
    for config in configs_of(parse(command, monkeypatch)):
        assert re.fullmatch('[A-Z_.]*', config) or config.startswith('my_configs/') or is_there(config)


@pytest.mark.parametrize('command', README_COMMANDS)
def test_config_of_a_readme_command_replaces_blocks_or_folds_norms(command, monkeypatch):
    args = parse(command, monkeypatch)
    cfgs = [load_config(path if '::' in path else str(ROOT / path), args.cfg_options) for path in configs_of(args)]
    backbone = cfgs[-1].model.backbone
    assert MODELS.build(backbone).replacement_report.replaced if 'replacement' in backbone else backbone.fold_norm


@pytest.mark.parametrize('command', ON_SHARED_DATA)
def test_command_on_shared_data_passes_the_checks(command, monkeypatch, tmp_path):
    args = parse(command, monkeypatch)
    monkeypatch.chdir(ROOT)
    if not Path(args.cfg_options['data_root']).is_dir():
        pytest.skip(f'{args.cfg_options["data_root"]} is not here')
    check_training(load_config(args.config, args.cfg_options, str(tmp_path)))


@pytest.mark.parametrize('target', sorted({line.split()[1] for _, line in LINES if line.startswith('make ')}))
def test_make_target_exists(target):
    assert f'\n{target}:' in (ROOT / 'Makefile').read_text()


def test_python_compiles():
    for page, kind, block in BLOCKS:
        if kind == 'python':
            compile(block, page, 'exec')


@pytest.mark.parametrize('text', CONFIGS, ids=lambda text: f'config{CONFIGS.index(text)}')
def test_config_builds_its_backbone(text):
    cfg = Config.fromstring(text, '.py')
    backbone = build_backbone(cfg)
    assert not cfg.model.backbone.get('replacement') or backbone.replacement_report.replaced


def test_configs_for_own_data_load_from_a_folder_beside_ours_and_find_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my_configs').mkdir()
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    files = re.findall(r'`my_configs/([\w.-]+)`.*?```python\n(.*?)```', PAGES['docs/own_data.md'], re.DOTALL)
    for name, text in files:
        (tmp_path / 'my_configs' / name).write_text(text)
    (tmp_path / 'data' / 'mine' / 'images').mkdir(parents=True)
    for name in ('train.json', 'val.json'):
        (tmp_path / 'data' / 'mine' / name).touch()

    baseline, replaced = (load_config(f'my_configs/{name}') for name, _ in files)
    for phase in ('train', 'val', 'test'):
        check_data(replaced, phase)
    assert baseline.model.backbone.type == 'ResNet'
    assert baseline.model.roi_head.bbox_head.num_classes == 2
    assert replaced.model.roi_head == baseline.model.roi_head
    assert build_backbone(replaced).replacement_report.replaced == {'layer2': [1], 'layer3': [1, 3], 'layer4': [1]}


@pytest.mark.parametrize('name', ['rl_v1', 'rl_v2', 'rl_v2_pretrained'])
def test_recipe_goes_into_a_config_with_fold_norm(name, tmp_path):
    recipes = [str(ROOT / 'configs' / '_base_' / f'{each}.py') for each in (name, 'fold_norm')]
    path = tmp_path / 'config.py'
    path.write_text(f'''_base_ = {['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', *recipes]}
model = dict(backbone=dict(type='RLResNet', replacement=_base_.replacement, **_base_.fold_norm))
''')
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.fold_norm
    assert build_backbone(cfg).replacement_report.replaced == {'layer2': [1], 'layer3': [1, 3], 'layer4': [1]}
    assert [hook.type for hook in cfg.custom_hooks] == ['StartHook', 'LearningStepsHook', 'FiniteLossHook']


def test_contributing_operator_runs_learns_and_materializes():
    text = next(block for page, kind, block in BLOCKS if page == 'CONTRIBUTING.md' and kind == 'python')
    try:
        exec(text, {'__name__': 'scale'})
        net = nn.Sequential(*(Bottleneck(16, 4) for _ in range(3))).double().eval()
        for block in net:
            nn.init.uniform_(block.bn3.weight)
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'': [1]}), operator=dict(type='Scale'),
                                  gradient=dict(every=1)))
        x = torch.randn(2, 16, 6, 6, dtype=torch.double)
        net(x).sum().backward()
        [layer] = computing_layers(net).values()
        assert layer.coeff.grad.abs().min() > 0
        assert torch.allclose(materialize(net)(x), net(x))
    finally:
        OPERATORS.module_dict.pop('Scale', None)


@pytest.mark.parametrize('page', PAGES)
def test_links_within_the_repository_lead_somewhere(page):
    inline = re.findall(r'\]\((?!\w+:)([^)\s]+)\)', PAGES[page])
    for link in inline + re.findall(r'^\[\w+\]: (\S+)', PAGES[page], re.MULTILINE):
        path, _, anchor = link.partition('#')
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
