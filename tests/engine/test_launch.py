"""What a tool does around its own work."""
from argparse import Namespace

import pytest
import torch

from rl_mmdet import engine


class Code:
    """Something that only pickle can bring back."""


def test_no_file_runs_code_in_a_tool_unless_allowed(tmp_path):
    torch.save(Code(), tmp_path / 'file.pth')

    def read(args):
        torch.load(tmp_path / 'file.pth', weights_only=False)

    engine.run_tool(read, Namespace(allow_pickle=True))
    with pytest.raises(SystemExit):
        engine.run_tool(read, Namespace())


def test_an_error_does_nothing_to_the_terminal(capsys):
    def fail(args):
        raise engine.UserError('tensor a\x1b[31m\r\x07')
    with pytest.raises(SystemExit) as stop:
        engine.run_tool(fail, Namespace())
    assert stop.value.code == 1
    assert capsys.readouterr().err == 'error: tensor a\\x1b[31m\\r\\x07\n'


@pytest.mark.parametrize('error', [
    RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:31901'),
    torch.distributed.DistBackendError('NCCL error: remote process exited')])
def test_a_process_that_is_gone_ends_the_others_with_one_line(capsys, monkeypatch, error):
    def fail(args):
        raise error
    with pytest.raises(type(error)):
        engine.run_tool(fail, Namespace())
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    with pytest.raises(SystemExit):
        engine.run_tool(fail, Namespace())
    line, = capsys.readouterr().err.splitlines()
    assert 'another process of the run has ended' in line and str(error) in line and '--resume' in line


@pytest.mark.parametrize('workers', [0, 1])
def test_a_file_that_has_disappeared_is_named_in_one_line(capsys, tmp_path, workers):
    def read(path):
        return path.read_bytes()

    def load(args):
        list(torch.utils.data.DataLoader([tmp_path / 'gone.jpg'], collate_fn=lambda paths: read(paths[0]),
                                         num_workers=workers))
    with pytest.raises(SystemExit):
        engine.run_tool(load, Namespace())
    assert capsys.readouterr().err == (
        f'error: {tmp_path}/gone.jpg: there is no such file; was it moved or deleted meanwhile?\n')
