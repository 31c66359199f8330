"""A run with a transfer: it learns which tensors are updated, and all others stay bit for bit the pretrained ones."""
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook, Hook

from rl_mmdet.deploy import apply_delta, save_delta
from rl_mmdet.engine import (
    UserError,
    add_rl_defaults_,
    begin_or_resume_,
    build_model,
    build_runner,
    check_testing,
    load_config,
    read_checkpoint,
    resume_checkpoint,
    take_found_,
)

EPOCHS = 4
TRANSFER = '''
custom_imports = dict(imports=['rl_mmdet'], allow_failed_imports=False)
model = dict(
    backbone=dict(type='RLResNet', base_channels=4, norm_eval=True, transfer=dict(type='SWR', budget=0.1)),
    neck=dict(in_channels=[4, 8, 16, 32]))
custom_hooks = [dict(type='SearchHook', interval=2), dict(type='EMAHook', momentum=0.3)]
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
train_dataloader['dataset']['num_images'] = 4
''' + f'train_cfg = dict(max_epochs={EPOCHS}, val_begin=9)\n'
ROOT = Path(__file__).resolve().parents[2]
names = itertools.count()


class Killed(Exception):
    """Ends a run in its middle."""


class StopBefore(Hook):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            raise Killed


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('transfer')


@pytest.fixture(scope='module')
def config(write_tiny_config, folder):
    return write_tiny_config(folder, 'atss_r34_fpn_digits.py', TRANSFER)


@pytest.fixture(scope='module')
def base(config, folder):
    """A pretrained detector."""
    runner = start(config, folder / 'base', **{'model.backbone.transfer': None, 'train_cfg.max_epochs': 1})
    runner.train()
    return str(folder / 'base/epoch_1.pth')


def start(config, work, resume=None, **options):
    name = f'transfer_{os.getpid()}_{next(names)}'
    cfg = load_config(config, options | {'experiment_name': name, 'visualizer.name': name}, str(work))
    if resume:
        begin_or_resume_(cfg, resume)
    take_found_(cfg, resume_checkpoint(cfg))
    return build_runner(add_rl_defaults_(cfg))


def train(*args, stop=None, **options):
    runner = start(*args, **options)
    if stop is None:
        runner.train()
        return runner
    runner.register_hook(StopBefore(stop))
    with pytest.raises(Killed):
        runner.train()
    return runner


@pytest.fixture(scope='module')
def whole(config, base, folder):
    return train(config, folder / 'whole', load_from=base)


def chosen(runner):
    return {name for name, parameter in runner.model.backbone.named_parameters() if parameter.requires_grad}


def test_only_the_chosen_tensors_of_the_backbone_differ_from_the_base(whole, base):
    """In the model, and in the average of it that its checkpoints have."""
    before, after = read_checkpoint(base)['state_dict'], whole.model.state_dict()
    average = next(hook.ema_model for hook in whole.hooks if isinstance(hook, EMAHook)).module.state_dict()
    backbone, optimizer = dict(whole.model.backbone.named_parameters()), whole.optim_wrapper.optimizer
    updated = sum(backbone[name].numel() for name in chosen(whole))
    assert 0.099 <= updated / sum(p.numel() for p in backbone.values()) <= 0.1
    for name, parameter in backbone.items():
        if name in chosen(whole):
            assert parameter in optimizer.state
        else:
            assert torch.equal(parameter, before[f'backbone.{name}']), name
            torch.testing.assert_close(average[f'backbone.{name}'], before[f'backbone.{name}'], msg=name)
            assert parameter not in optimizer.state and parameter.grad is None, name
    assert any(not torch.equal(after[f'backbone.{name}'], before[f'backbone.{name}']) for name in chosen(whole))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items() if name.startswith('bbox_head.'))


def test_the_task_is_a_small_delta_file(whole, base, folder):
    tuned, delta, applied = f'{whole.work_dir}/epoch_{EPOCHS}.pth', str(folder / 'd.safetensors'), str(folder / 'a.pth')
    save_delta(base, tuned, delta)
    apply_delta(base, delta, applied)
    expected, actual = read_checkpoint(tuned)['state_dict'], read_checkpoint(applied)['state_dict']
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_the_found_config_is_an_ordinary_one(whole, config, folder):
    found = load_config(f'{whole.work_dir}/{Path(config).stem}_found.py', work_dir=str(folder / 'again'))
    assert found.model.backbone.transfer.type == 'Tensors'
    assert 'SearchHook' not in [hook['type'] for hook in found.custom_hooks]
    model = build_model(found)
    assert {name for name, p in model.backbone.named_parameters() if p.requires_grad} == chosen(whole)


@pytest.mark.parametrize('after', [False, True], ids=['killed in the search', 'after it'])
def test_a_resumed_run_ends_like_the_undisturbed_one(config, base, whole, folder, after):
    if after:
        resumed = train(config, folder / 'after', resume=f'{whole.work_dir}/epoch_3.pth')
    else:
        train(config, folder / 'killed', load_from=base, stop=3)
        resumed = train(config, folder / 'killed', resume='auto')
    assert chosen(resumed) == chosen(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_what_can_be_tested_with_the_searchs_config(config, whole, folder):
    cfg, last = load_config(config, work_dir=str(folder / 'test')), f'{whole.work_dir}/epoch_{EPOCHS}.pth'
    with pytest.raises(UserError, match="wasn't saved after the search that the config asks for"):
        check_testing(cfg, f'{whole.work_dir}/epoch_1.pth')
    take_found_(cfg, last)
    check_testing(cfg, last)


def test_accumulated_gradients(config, base, folder):
    runner = train(config, folder / 'accumulated', load_from=base, **{'optim_wrapper.accumulative_counts': 2})
    assert 'Tensors' in Path(f'{runner.work_dir}/{Path(config).stem}_found.py').read_text()


@pytest.mark.slow
def test_two_processes_end_with_the_chosen_tensors_updated_and_no_others(config, base, folder):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=29741']
    command = [*torchrun, 'tools/train.py', config, '--launcher', 'pytorch', '--work-dir', str(folder / 'ddp'),
               '--cfg-options', f'load_from={base}', 'train_cfg.max_epochs=2']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-2000:]
    saved, before = read_checkpoint(str(folder / 'ddp/epoch_2.pth')), read_checkpoint(base)['state_dict']
    names = {f'backbone.{name}' for name in saved['meta']['found']['transfer']['names']}
    changed = {name for name, tensor in saved['state_dict'].items()
               if name.startswith('backbone.') and not torch.equal(tensor, before[name])}
    assert changed and changed <= names
