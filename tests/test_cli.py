"""The command rl-mmdet, which runs the tools."""
import argparse
import os
import re
import subprocess
import sys

import pytest

import rl_mmdet_cli
from rl_mmdet import __version__

ENVIRONMENT = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; returns its exit status and what it wrote."""
    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['rl-mmdet', *arguments])
        try:
            rl_mmdet_cli.main()
        except SystemExit as stop:
            return stop.code or 0, capsys.readouterr().out
        return 0, capsys.readouterr().out
    return call


def test_without_arguments_it_lists_its_commands(run):
    status, text = run()
    assert status == 0
    for name in ('init', 'train', 'test', 'compare', 'blocks', 'choose', 'materialize', 'export', 'delta'):
        assert f'\n  {name} ' in text


def test_version(run):
    assert run('--version') == (0, f'rl_mmdet {__version__}\n')


def test_an_unknown_command_is_one_line_with_those_allowed(run):
    status, _ = run('trian')
    assert status.startswith('error: rl-mmdet trian: unknown command, allowed: init, train, ')
    assert '\n' not in status


def test_every_command_shows_its_own_usage_without_waiting_for_pytorch():
    code = """if True:
        import contextlib, sys, rl_mmdet_cli
        for name in rl_mmdet_cli.COMMANDS:
            sys.argv = ['rl-mmdet', name, '--help']
            with contextlib.suppress(SystemExit):
                rl_mmdet_cli.main()
        print(*sys.modules)
    """
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENVIRONMENT)
    assert re.findall(r'^usage: rl-mmdet (\S+)', done.stdout, re.MULTILINE) == list(rl_mmdet_cli.COMMANDS), done.stderr
    assert not {'torch', 'mmcv', 'mmdet', 'rl_mmdet'} & set(done.stdout.splitlines()[-1].split())


def test_a_tool_says_nothing_but_its_own_words(tmp_path):
    """Not what MMDetection and others print when they are imported."""
    done = subprocess.run([sys.executable, '-W', 'default', '-W', 'ignore::ResourceWarning', '-m',
                           'rl_mmdet_cli', 'blocks', 'none.py'], cwd=tmp_path,
                          capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (1, '')
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith('error: config none.py: ')


@pytest.mark.parametrize(('arguments', 'complaint'), [
    (['--cfg-options', 'a=1', 'load_from'], "argument --cfg-options: 'load_from' isn't KEY=VALUE\n"),
    (['--cfg-options', "a.plan=dict(type='EveryKth', k=2)"], 'write each key of a dict by itself, as in a.plan.type='),
    (['--ignore-keys', '*head'], "argument --ignore-keys: '*head' is no regular expression (nothing to repeat ")])
def test_an_option_that_cannot_be_read_is_named(capsys, arguments, complaint):
    parser = argparse.ArgumentParser(parents=[rl_mmdet_cli.config_arguments()])
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(['config.py', *arguments])
    assert ended.value.code == 2 and complaint in capsys.readouterr().err
    assert parser.parse_args(['config.py', '--cfg-options', 'a.b=[1,2]']).cfg_options == {'a.b': [1, 2]}
