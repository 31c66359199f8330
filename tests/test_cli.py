"""The command rl-mmdet, which runs the tools."""
import sys

import pytest

import rl_mmdet_cli
from rl_mmdet import __version__


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
    for name in ('init', 'train', 'test', 'compare', 'blocks', 'choose', 'materialize', 'delta'):
        assert f'\n  {name} ' in text


def test_version(run):
    assert run('--version') == (0, f'rl_mmdet {__version__}\n')


def test_an_unknown_command_is_one_line_with_those_allowed(run):
    status, _ = run('trian')
    assert status.startswith('error: rl-mmdet trian: unknown command, allowed: init, train, ')
    assert '\n' not in status


@pytest.mark.parametrize('command', rl_mmdet_cli.COMMANDS)
def test_every_command_shows_its_own_usage(run, command):
    status, text = run(command, '--help')
    assert status == 0
    assert text.startswith(f'usage: rl-mmdet {command} ')
