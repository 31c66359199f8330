"""What a tool does around its own work."""
from argparse import Namespace

import pytest
import torch

from rl_mmdet import engine


class Code:
    """Something that only pickle can bring back."""


def test_no_file_runs_code_in_a_tool_unless_allowed(tmp_path):
    torch.save(Code(), tmp_path / 'file.pth')
    found = []

    def read(args):
        found.append(torch.load(tmp_path / 'file.pth', weights_only=False))

    engine.run_tool(read, Namespace(allow_pickle=True))
    assert isinstance(found[0], Code)
    with pytest.raises(SystemExit):
        engine.run_tool(read, Namespace())


def test_an_error_does_nothing_to_the_terminal(capsys):
    def fail(args):
        raise engine.UserError('tensor a\x1b[31m\r\x07')
    with pytest.raises(SystemExit) as stop:
        engine.run_tool(fail, Namespace())
    assert stop.value.code == 1
    assert capsys.readouterr().err == 'error: tensor a\\x1b[31m\\r\\x07\n'
