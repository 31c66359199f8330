"""tools/export.py as a user calls it."""
import os

import pytest
import torch

from rl_mmdet.engine import build_model, load_config

for package in ('onnx', 'onnxruntime', 'onnxscript'):
    pytest.importorskip(package, reason='needs the extra deploy')
SMALL = '''
model = dict(backbone=dict(base_channels=4, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1)),
             neck=dict(in_channels=[4, 8], start_level=0, num_outs=2))
'''


def test_it_writes_a_graph_for_one_size_and_says_what_was_checked(run_tool, tiny_config):
    config = tiny_config(more=SMALL)
    torch.save(build_model(load_config(config)).state_dict(), 'rl.pth')
    status, output = run_tool('export')(config, 'rl.pth', 'out.onnx', '--size', 32, 64)
    assert status == 0
    assert output.out.startswith('out.onnx: one image of 32×64 in, 2 feature maps of 48, 48 channels out; checked on 2 '
                                 'val images of 32×64: maps differ from torch\'s by ')
    assert os.path.getsize('out.onnx') > 10_000


def test_a_mistake_is_one_line_and_nothing_is_written(run_tool, tiny_config, tmp_path):
    config = tiny_config()
    before = sorted(tmp_path.iterdir())
    status, output = run_tool('export')(config, 'nothing.pth', 'out.onnx')
    assert (status, output.err) == (1, 'error: nothing.pth: there is no such checkpoint file\n')
    assert sorted(tmp_path.iterdir()) == before
