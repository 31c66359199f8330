"""The tools as a user calls them, on a tiny detector."""
import glob
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine import load

from rl_mmdet.engine import build_model, load_config

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


def scalars(work_dir):
    """All logged training and evaluation numbers of a work dir, in order."""
    files = sorted(glob.glob(f'{work_dir}/*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in open(file)]


def log(work_dir):
    return '\n'.join(Path(file).read_text() for file in sorted(glob.glob(f'{work_dir}/*/*.log')))


def test_train_from_a_pretrained_backbone_then_test_and_resume(run_tool, tiny_config, tmp_path):
    baseline = build_model(load_config(tiny_config('atss_r34_fpn_digits.py')))
    torch.save(baseline.backbone.state_dict(), tmp_path / 'backbone.pth')
    init = f"dict(type='Pretrained', checkpoint='{tmp_path}/backbone.pth')"
    config = tiny_config(more='model = dict(backbone=dict(base_channels=4, norm_eval=True, '
                              f'init_cfg={init}), neck=dict(in_channels=[4, 8, 16, 32]))')
    train, test = run_tool('train'), run_tool('test')
    status, _ = train(config, '--work-dir', 'work', '--cfg-options', 'experiment_name=first', 'visualizer.name=first')
    assert status == 0
    text = log('work')
    for line in ('backbone.replacement:', '5 of 16 blocks replaced', 'loaded: ',
                 'used for initialisation: 5 removed blocks', 'missing: ', 'left over: ',
                 'recalibrated 10 BatchNorms', 'Epoch(val) [1][1/1]'):
        assert line in text

    state = torch.load('work/epoch_1.pth', weights_only=False)['state_dict']
    del state['bbox_head.atss_cls.bias']
    torch.save(dict(state_dict=state), 'incomplete.pth')
    status, output = test(config, 'incomplete.pth', '--work-dir', 'refused')
    assert status == 1 and '1 tensors don\'t fit' in output.err and '--ignore-keys' in output.err
    status, output = test(config, 'incomplete.pth', '--work-dir', 'test', '--out', 'predictions.pkl', '--ignore-keys',
                          'atss_cls.bias')
    assert status == 0
    assert [prediction['img_id'] for prediction in load('predictions.pkl')] == [0, 1]
    assert 'Evaluating bbox' in log('test')
    assert 'missing keys in source state_dict: bbox_head.atss_cls.bias\n' in output.out
    assert 'unexpected key' not in output.out

    status, _ = train(config, '--work-dir', 'work', '--resume', '--cfg-options', 'train_cfg.max_epochs=2',
                      'experiment_name=second', 'visualizer.name=second')
    assert status == 0
    assert Path('work/epoch_2.pth').is_file()
    assert log('work').count('recalibrated') == 1
    assert [entry['epoch'] for entry in scalars('work') if 'loss' in entry][-1] == 2


@pytest.mark.slow
def test_dist_train_trains_in_two_processes_without_a_gpu(tiny_config, tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, 'PYTHON': sys.executable, 'CUDA_VISIBLE_DEVICES': '', 'PORT': port, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(['bash', str(TOOLS / 'dist_train.sh'), tiny_config(), '2', '--work-dir', 'work'],
                          cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'GPU number: 2' in log(tmp_path / 'work')
    state = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=False)['state_dict']
    assert sum(key.endswith('.coeff') for key in state) == 5


def test_train_stops_at_a_non_finite_loss_and_does_not_save_it(run_tool, tiny_config):
    config = tiny_config(more="optim_wrapper = dict(clip_grad=None, optimizer=dict(_delete_=True, type='SGD', "
                              "lr=1000))\nparam_scheduler = None\ndefault_hooks = dict(checkpoint=dict("
                              "by_epoch=False, interval=1))")
    status, output = run_tool('train')(config, '--work-dir', 'work', '--cfg-options', 'experiment_name=diverge')
    assert status == 1
    assert 'Traceback' not in output.err
    line = output.err.strip().splitlines()[-1]
    assert line.startswith('error: iteration ')
    assert 'nan' in line or 'inf' in line
    files = glob.glob('work/*.pth')
    assert files and f'work/iter_{line.split()[2].rstrip(":")}.pth' not in files
    for file in files:
        state = torch.load(file, weights_only=False)['state_dict']
        assert all(torch.isfinite(tensor).all() for tensor in state.values())


@pytest.mark.parametrize(('tool', 'more', 'complaint'), [
    ('train', ['--cfg-options', 'model.backbone.replacement.plan.k=1'], 'k must be an integer of at least 2'),
    ('test', ['nothing.pth'], 'nothing.pth: there is no such checkpoint file'),
    ('test', ['nothing.pth', '--out', 'predictions.json'], '--out predictions.json: must end in .pkl or .pickle'),
    ('materialize', ['nothing.pth', 'out.pth'], 'nothing.pth: there is no such checkpoint file'),
])
def test_a_mistake_is_one_line_and_nothing_is_written(run_tool, tiny_config, tmp_path, tool, more, complaint):
    config = tiny_config()
    status, output = run_tool(tool)(config, *more)
    assert status == 1
    assert output.err.startswith('error: ') and complaint in output.err
    assert 'Traceback' not in output.err
    assert [path.name for path in tmp_path.iterdir()] == [Path(config).name]


def test_blocks_lists_every_block_with_neighbours(run_tool, tiny_config):
    status, output = run_tool('blocks')(tiny_config())
    assert status == 0
    assert output.out.count('BasicBlock') == 16
    assert 'no kept block after it' in output.out and 'layer1.0, layer1.2' in output.out


def test_blocks_of_a_baseline_shows_what_could_be_replaced(run_tool, tiny_config):
    status, output = run_tool('blocks')(tiny_config('atss_r34_fpn_digits.py'))
    assert status == 0
    assert 'no replacement' in output.out
    assert 'replaced' not in output.out.replace("can't be replaced", '').replace('can be replaced', '')
