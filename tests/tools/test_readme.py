"""The README's commands and configs are what the tools accept."""
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from mmdet.registry import MODELS
from mmengine.config import Config

from rl_mmdet.engine import check_training, load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README, re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == 'bash' for line in block.splitlines()]
TOOL_COMMANDS = [line for line in LINES if re.match(r'(python|bash) tools/', line)]


def parse(command, monkeypatch):
    """Let a tool parse the command's arguments; a shell launcher's are those of the Python tool it starts."""
    words = shlex.split(command, comments=True)
    tool = words[1]
    if tool.endswith('.sh'):
        tool, words = tool.replace('dist_', '').replace('.sh', '.py'), [*words[:3], *words[4:]]
    monkeypatch.setattr(sys, 'argv', words[1:])
    return runpy.run_path(str(ROOT / tool), run_name='parse_only')['parse_args']()


def test_readme_has_commands_for_every_tool():
    used = {shlex.split(command)[1] for command in TOOL_COMMANDS}
    assert used >= {f'tools/{name}' for name in ('train.py', 'test.py', 'blocks.py', 'materialize.py', 'dist_train.sh')}


@pytest.mark.parametrize('command', TOOL_COMMANDS)
def test_readme_command_is_accepted_and_its_config_replaces_blocks(command, monkeypatch):
    args = parse(command, monkeypatch)
    configs = args.configs if 'compare.py' in command else [args.config]
    cfgs = [load_config(path if '::' in path else str(ROOT / path), args.cfg_options) for path in configs]
    assert MODELS.build(cfgs[-1].model.backbone).replacement_report.replaced


@pytest.mark.parametrize('command', [command for command in TOOL_COMMANDS if '../shared' in command])
def test_readme_command_on_shared_data_passes_the_checks(command, monkeypatch, tmp_path):
    args = parse(command, monkeypatch)
    monkeypatch.chdir(ROOT)
    if not Path(args.cfg_options['data_root']).is_dir():
        pytest.skip(f'{args.cfg_options["data_root"]} is not here')
    check_training(load_config(args.config, args.cfg_options, str(tmp_path)))


@pytest.mark.parametrize('target', [line.split()[1] for line in LINES if line.startswith('make ')])
def test_readme_make_target_exists(target):
    assert f'\n{target}:' in (ROOT / 'Makefile').read_text()


def test_readme_config_replaces_blocks():
    text = next(block for kind, block in BLOCKS if kind == 'python' and '_base_' in block)
    backbone = Config.fromstring(text, '.py').model.backbone
    backbone.init_cfg = None
    assert MODELS.build(backbone).replacement_report.replaced == {'layer2': [1], 'layer3': [1], 'layer4': [1]}
