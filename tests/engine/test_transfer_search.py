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
    build_runner,
    check_testing,
    check_training,
    load_config,
    read_checkpoint,
    resume_checkpoint,
    take_found_,
)
from rl_mmdet.engine.options import set_resume_

EPOCHS = 4
TRANSFER = '''
custom_imports = dict(imports=['rl_mmdet'], allow_failed_imports=False)
model = dict(
    backbone=dict(type='RLResNet', base_channels=4, norm_eval=True, transfer=dict(type='SWR', budget=0.1)),
    neck=dict(in_channels=[4, 8, 16, 32]))
custom_hooks = [dict(type='SearchHook', interval=2)]
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
train_dataloader['dataset']['num_images'] = 4
''' + f'train_cfg = dict(max_epochs={EPOCHS}, val_interval=2)\n'
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
        set_resume_(cfg, resume)
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
    before, after = read_checkpoint(base)['state_dict'], whole.model.state_dict()
    backbone = dict(whole.model.backbone.named_parameters())
    updated = sum(backbone[name].numel() for name in chosen(whole))
    assert 0.099 <= updated / sum(p.numel() for p in backbone.values()) <= 0.1
    for name, tensor in after.items():
        if name.startswith('backbone.') and name.removeprefix('backbone.') not in chosen(whole):
            assert torch.equal(tensor, before[name]), name
    assert any(not torch.equal(after[f'backbone.{name}'], before[f'backbone.{name}']) for name in chosen(whole))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items() if name.startswith('bbox_head.'))


def test_frozen_tensors_have_no_gradient_and_no_optimizer_state(whole):
    optimizer = whole.optim_wrapper.optimizer
    for name, parameter in whole.model.backbone.named_parameters():
        assert (parameter in optimizer.state) <= (name in chosen(whole)), name
        assert parameter.grad is None or name in chosen(whole), name
    assert any(parameter in optimizer.state for parameter in whole.model.backbone.parameters())


def test_the_task_is_a_small_delta_file(whole, base, folder):
    tuned, delta, applied = f'{whole.work_dir}/epoch_{EPOCHS}.pth', str(folder / 'd.safetensors'), str(folder / 'a.pth')
    save_delta(base, tuned, delta)
    apply_delta(base, delta, applied)
    expected, actual = read_checkpoint(tuned)['state_dict'], read_checkpoint(applied)['state_dict']
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_the_found_config_is_an_ordinary_one(whole, config, base, folder):
    found = load_config(f'{whole.work_dir}/{Path(config).stem}_found.py', work_dir=str(folder / 'again'))
    assert set(found.model.backbone.transfer.names) == chosen(whole)
    assert found.model.backbone.transfer.type == 'Tensors'
    assert 'SearchHook' not in [hook['type'] for hook in found.custom_hooks]
    again = train(found.filename, folder / 'again', load_from=base, **{'train_cfg.max_epochs': 1})
    assert chosen(again) == chosen(whole)


def test_a_killed_search_resumes_and_ends_like_the_undisturbed_one(config, base, whole, folder):
    train(config, folder / 'killed', load_from=base, stop=3)
    resumed = train(config, folder / 'killed', resume='auto')
    assert chosen(resumed) == chosen(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_after_the_search_a_run_resumes_and_tests_with_the_searchs_config(config, whole, folder):
    resumed = train(config, folder / 'after', resume=f'{whole.work_dir}/epoch_3.pth')
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    cfg = load_config(config, work_dir=str(folder / 'test'))
    last = f'{resumed.work_dir}/epoch_{EPOCHS}.pth'
    take_found_(cfg, last)
    check_testing(cfg, last)


def test_what_was_saved_during_the_search_is_not_tested(config, whole, folder):
    cfg = load_config(config, work_dir=str(folder / 'test'))
    with pytest.raises(UserError, match="wasn't saved after the search that the config asks for"):
        check_testing(cfg, f'{whole.work_dir}/epoch_1.pth')


def test_the_average_of_frozen_tensors_is_the_pretrained_one(config, base, folder):
    options = {'custom_hooks': [dict(type='SearchHook'), dict(type='EMAHook', momentum=0.3)], 'load_from': base}
    runner = train(config, folder / 'ema', **options)
    average = next(hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)).module
    before = read_checkpoint(base)['state_dict']
    for name, parameter in average.backbone.named_parameters():
        if name not in chosen(runner):
            torch.testing.assert_close(parameter, before[f'backbone.{name}'], msg=name)


def test_accumulated_gradients(config, base, folder):
    runner = train(config, folder / 'accumulated', load_from=base, **{'optim_wrapper.accumulative_counts': 2})
    assert 'Tensors' in Path(f'{runner.work_dir}/{Path(config).stem}_found.py').read_text()


def test_longer_than_the_run(config, base, folder):
    cfg = load_config(config, {'model.backbone.transfer.epochs': EPOCHS + 1}, str(folder / 'long'))
    with pytest.raises(UserError, match=r'SWR\(budget=0.1\): the search of 5 epochs is longer than the run of 4 \('):
        check_training(add_rl_defaults_(cfg))
    assert not (folder / 'long').exists()


def test_two_processes_choose_the_same_and_end_with_the_same_weights(config, base, folder):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=29741']
    command = [*torchrun, 'tools/train.py', config, '--launcher', 'pytorch', '--work-dir', str(folder / 'ddp'),
               '--cfg-options', f'load_from={base}', 'train_cfg.max_epochs=2']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-2000:]
    saved = read_checkpoint(str(folder / 'ddp/epoch_2.pth'))
    names = saved['found']['transfer']['names']
    before = read_checkpoint(base)['state_dict']
    for name, tensor in saved['state_dict'].items():
        if name.startswith('backbone.') and name.removeprefix('backbone.') not in names:
            assert torch.equal(tensor, before[name]), name
