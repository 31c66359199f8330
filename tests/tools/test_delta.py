"""tools/delta.py as a user calls it."""
import torch


def test_save_info_and_apply(run_tool, tmp_path):
    delta = run_tool('delta')
    base = dict(a=torch.ones(2, 3), b=torch.zeros(4))
    torch.save(dict(state_dict=base), tmp_path / 'base.pth')
    torch.save(dict(state_dict=base | dict(b=torch.ones(4))), tmp_path / 'tuned.pth')
    status, output = delta('save', 'base.pth', 'tuned.pth', 'task.safetensors')
    assert status == 0
    assert "task.safetensors: 1 tensors of 4 numbers, 40.0% of the base's 10;" in output.out
    status, output = delta('info', 'task.safetensors')
    assert '  b [4]' in output.out.splitlines()
    assert delta('apply', 'base.pth', 'task.safetensors', 'again.pth')[0] == 0
    assert torch.load('again.pth', weights_only=True)['state_dict']['b'].equal(torch.ones(4))
    status, output = delta('apply', 'tuned.pth', 'task.safetensors', 'wrong.pth')
    assert status == 1
    assert 'error: tuned.pth: not the base of this delta' in output.err
