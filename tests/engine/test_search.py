"""A run that learns its plan: it searches, turns into the ordinary replaced run, and can be resumed at any time.

Run as a script, ``test_search.py RANK WORLD CONFIG FOLDER``, this file is one of two processes of DDP.
"""
import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from rl_mmdet.engine import (
    UserError,
    add_rl_defaults_,
    begin_or_resume_,
    build_model,
    build_runner,
    check_testing,
    check_training,
    load_config,
    read_checkpoint,
    resume_checkpoint,
    take_found_,
)
from rl_mmdet.engine.hooks import SearchHook
from rl_mmdet.replacement import computing_layers

WORLD = 2
EPOCHS, STEPS = 6, 6
"""Of a run of two iterations an epoch; the search is its first half."""
OPEN = ['layer1.1', 'layer2.1', 'layer2.2', 'layer3.1', 'layer3.2', 'layer3.3', 'layer3.4', 'layer4.1']
"""Blocks of the tiny backbone that can be replaced."""
SEARCH = '''
plan = dict(_delete_=True, type='LearnedPlan', budget=dict(params=0.8))
model = dict(
    backbone=dict(base_channels=4, norm_eval=False, replacement=dict(plan=plan)), neck=dict(in_channels=[4, 8, 16, 32]))
custom_hooks = [dict(type='SearchHook', interval=2), dict(type='StartHook', num_batches=2),
                dict(type='LearningStepsHook')]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=-1))
train_dataloader['dataset']['num_images'] = 4
'''
"""ATSS draws nothing at random, so equal runs are equal bit for bit."""
EPOCH_RUN = SEARCH + f'train_cfg = dict(max_epochs={EPOCHS}, val_interval=2)\n'
GROUPS = "optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0., custom_keys={'backbone': dict(lr_mult=0.5)}))\n"
"""Makes MMEngine's constructor give every parameter its own group."""
EMA = "custom_hooks.append(dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum={}, gamma={}, update_buffers={}))\n"
names = itertools.count()


class Killed(Exception):
    """Ends a run in its middle."""


class Trace(Hook):
    """What happens in a run.

    Args:
        stop: kills the run before this iteration.

    Attributes:
        gates, scores, settled: of the policy, in each iteration.
        shown: gates during validation, and the choice that would be made.
        before, after: the run just before the last step of the search, and just after the search.
    """
    priority = 'LOWEST'

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.gates, self.scores, self.settled, self.shown = [], [], [], []
        self.before, self.after, self.fitted, self.policy = {}, {}, {}, None

    def before_train(self, runner: Runner) -> None:
        self.fitted = {name: value.clone() for name, value in plain(runner).state_dict().items()}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.stop:
            raise Killed
        search = searching(runner)
        if search is not None:
            self.policy = search.policy
            self.gates.append([block.gate.replace for block in search.space.blocks])
            if self.policy.step == self.policy.steps - 1:
                self.before = moment(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if len(self.scores) < len(self.gates):
            self.scores.append(self.policy.scores.clone())
            self.settled.append(self.policy.settled.clone())
        if not self.after and searching(runner) is None:
            self.after = moment(runner)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        search = searching(runner)
        if search is not None:
            self.shown.append(([block.gate.replace for block in search.space.blocks], search.best()))


def plain(runner: Runner) -> nn.Module:
    return getattr(runner.model, 'module', runner.model)


def hook_of(runner: Runner, kind: type[Hook]) -> Any:
    return next((hook for hook in runner.hooks if isinstance(hook, kind)), None)


def searching(runner: Runner) -> Any:
    hook = hook_of(runner, SearchHook)
    return hook and hook.search


def moment(runner: Runner) -> dict[str, Any]:
    """Objects and values of a run as they are now."""
    model, optimizer, averages = plain(runner), runner.optim_wrapper.optimizer, hook_of(runner, EMAHook)
    return dict(
        parameters=dict(model.named_parameters()), groups=[list(group['params']) for group in optimizer.param_groups],
        values_of=len(runner.optim_wrapper.param_groups),
        state={id(parameter): state['exp_avg'] for parameter, state in optimizer.state.items()},
        schedulers=[(len(each.base_values), len(each.get_last_value())) for each in runner.param_schedulers],
        average=averages and dict(averages.ema_model.module.named_parameters()),
        values={name: value.clone() for name, value in model.state_dict().items()},
        wrapper=weakref.ref(runner.model), unused=getattr(runner.model, 'find_unused_parameters', None))


def named() -> dict[str, Any]:
    """A name of its own for each run, as its logs and curves are kept by name."""
    name = f'search_{os.getpid()}_{next(names)}'
    return {'experiment_name': name, 'visualizer.name': name}


def start(config: str, work: Path | str, resume: str | None = None, hooks: tuple[Hook, ...] = (),
          **options: Any) -> Runner:
    """A run as tools/train.py makes it."""
    options = {key.replace('__', '.'): value for key, value in options.items()}
    cfg = load_config(config, options | named(), str(work))
    if resume:
        begin_or_resume_(cfg, resume)
    take_found_(cfg, resume_checkpoint(cfg))
    runner = build_runner(add_rl_defaults_(cfg))
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def train(*args: Any, stop: int | None = None, hooks: tuple[Hook, ...] = (), **kwargs: Any) -> tuple[Runner, Trace]:
    trace = Trace(stop)
    runner = start(*args, hooks=(trace, *hooks), **kwargs)
    if stop is None:
        runner.train()
    else:
        with pytest.raises(Killed):
            runner.train()
    return runner, trace


def same(actual: Any, expected: Any) -> bool:
    """Nested dicts and lists are equal, tensors bit for bit."""
    if isinstance(expected, Tensor):
        return torch.equal(actual, expected)
    if isinstance(expected, dict):
        return list(actual) == list(expected) and all(same(actual[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    return actual == expected


def assert_same_end(resumed: Runner, whole: Runner) -> None:
    """Weights, statistics and the optimizer's state are equal bit for bit, and so is the average of weights."""
    assert (resumed.iter, resumed.epoch) == (whole.iter, whole.epoch)
    assert same(dict(plain(resumed).state_dict()), dict(plain(whole).state_dict()))
    assert same(resumed.optim_wrapper.optimizer.state_dict(), whole.optim_wrapper.optimizer.state_dict())
    averages = [hook_of(runner, EMAHook) for runner in (resumed, whole)]
    if averages[1] is not None:
        assert same(*(dict(hook.ema_model.state_dict()) for hook in averages))


def plan_of(model: nn.Module) -> dict[str, list[int]]:
    return {chain: list(blocks) for chain, blocks in model.backbone.replacement_report.replaced.items()}


def assert_learned(runner: Runner) -> None:
    """The run has ended with an ordinary replaced model that keeps the budget."""
    model = plain(runner)
    assert searching(runner) is None
    assert computing_layers(model)
    assert not any('.replaced.' in name for name in model.state_dict())
    ordinary = build_model(runner.cfg)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in ordinary.named_modules()]
    assert {id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group['params']} == {
        id(p) for p in model.parameters()}
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('search')


@pytest.fixture(scope='module')
def write(write_tiny_config, folder) -> Callable[..., str]:
    """Write a search config, each to a folder of its own, all with the same data."""
    def config(more: str = EPOCH_RUN, base: str = 'atss_rl-r34-k2_fpn_digits.py') -> str:
        own = folder / f'config{next(names)}'
        own.mkdir()
        path = Path(write_tiny_config(own, base, more))
        path.write_text(path.read_text().replace(f'{own}/digits/', f'{folder}/digits/'))
        return str(path)
    return config


@pytest.fixture(scope='module')
def config(write) -> str:
    return write(EPOCH_RUN + GROUPS + EMA.format(0.1, 10, False))


@pytest.fixture(scope='module')
def whole(config, folder) -> tuple[Runner, Trace]:
    """A run that nobody has disturbed."""
    return train(config, folder / f'whole{next(names)}')


# A run

def test_the_first_half_searches_and_the_second_trains_the_replaced_model(whole):
    runner, trace = whole
    assert (len(trace.gates), runner.iter) == (STEPS, 2 * STEPS)
    assert len({tuple(gates) for gates in trace.gates}) > 2
    assert_learned(runner)
    assert plan_of(runner.model) == hook_of(runner, SearchHook).found['plan']['blocks']
    assert [shown == best and any(shown) for shown, best in trace.shown] == [True]


def test_the_choice_is_the_settled_gates_and_keeps_the_budget(whole):
    runner, trace = whole
    for earlier, later in itertools.pairwise(trace.settled):
        assert torch.equal(later[~earlier.isnan()], earlier[~earlier.isnan()])
    chosen = [name for name, gate in zip(OPEN, trace.settled[-1], strict=True) if gate]
    assert [f'{chain}.{index}' for chain, blocks in plan_of(runner.model).items() for index in blocks] == chosen
    sizes = [sum(parameter.numel() for parameter in build_model(cfg).backbone.parameters()) for cfg in (
        runner.cfg, load_config(runner.cfg.filename, {'model.backbone.replacement': None}))]
    assert 0.6 < sizes[0] / sizes[1] <= 0.8


def test_weights_and_the_optimizers_state_of_the_chosen_branches_go_on_as_they_are(whole):
    _, trace = whole
    before, after = trace.before['parameters'], trace.after['parameters']
    for name, parameter in after.items():
        searched = [other for other, candidate in before.items() if candidate is parameter]
        assert [other.replace('.replaced.', '.') for other in searched] == [name]
    held = [id(parameter) for group in trace.after['groups'] for parameter in group]
    assert sorted(held) == sorted(id(p) for p in after.values())
    assert all(trace.after['groups'])
    both = set(trace.before['state']) & set(held)
    assert both == set(trace.before['state']) & set(trace.after['state'])
    assert set(trace.after['state']) <= set(held)
    assert all(trace.after['state'][key] is trace.before['state'][key] for key in both)
    coefficients = {id(p) for name, p in after.items() if name.endswith('.coeff')}
    assert coefficients and coefficients <= both


def test_param_schedulers_stay_in_step_with_the_groups(whole):
    runner, trace = whole
    for at in (trace.before, trace.after):
        assert at['schedulers'] == [(at['values_of'], ) * 2] * len(runner.param_schedulers)
    assert trace.after['values_of'] < trace.before['values_of']
    groups, rate = runner.optim_wrapper.optimizer.param_groups, runner.cfg.optim_wrapper.optimizer.lr
    own = {id(p): name for name, p in runner.model.named_parameters()}
    for group in groups:
        assert group['initial_lr'] == rate * (0.5 if own[id(group['params'][0])].startswith('backbone') else 1.)
    ratios = [group['lr'] / group['initial_lr'] for group in groups]
    assert ratios == pytest.approx([ratios[0]] * len(groups), rel=1e-9)


def test_the_average_of_weights_goes_on_with_the_same_tensors(whole):
    runner, trace = whole
    average = hook_of(runner, EMAHook).ema_model
    assert [(name, type(module)) for name, module in average.module.named_modules()] == [
        (name, type(module)) for name, module in runner.model.named_modules()]
    before, after, own = trace.before['average'], trace.after['average'], dict(runner.model.named_parameters())
    assert list(after) == list(average.avg_parameters) == list(own)
    for name, tensor in after.items():
        searched = [other for other, candidate in before.items() if candidate is tensor]
        assert [other.replace('.replaced.', '.') for other in searched] == [name]
    last = read_checkpoint(f'{runner.work_dir}/epoch_{EPOCHS}.pth')['state_dict']
    assert all(torch.equal(last[name], value) for name, value in after.items())
    assert any(not torch.equal(value, own[name]) for name, value in after.items())


def test_the_found_config_is_an_ordinary_one_whose_model_loads_the_last_checkpoint(whole):
    runner, _ = whole
    work = Path(runner.work_dir)
    found = Config.fromfile(work / f'{Path(runner.cfg.filename).stem}_found.py')
    assert found.model.backbone.replacement.plan == dict(type='Blocks', blocks=plan_of(runner.model))
    assert 'SearchHook' not in [hook.type for hook in found.custom_hooks]
    assert found.find_unused_parameters is False
    last = read_checkpoint(str(work / f'epoch_{EPOCHS}.pth'))['state_dict']
    build_model(found).load_state_dict(last, strict=True)
    assert not list(work.glob('*.part'))


def test_checkpoints_have_the_policys_state_and_then_the_plan(whole):
    runner, trace = whole
    files = [read_checkpoint(f'{runner.work_dir}/epoch_{epoch}.pth') for epoch in range(1, EPOCHS + 1)]
    assert ['search' in file for file in files] == [True, True, False, False, False, False]
    found = dict(type='Blocks', blocks=plan_of(runner.model))
    assert [file['meta'].get('found') for file in files] == [None] * 2 + [dict(plan=found)] * 4
    for text in (files[-1]['meta']['cfg'], files[-1]['message_hub']['runtime_info']['cfg']):
        assert Config.fromstring(text, '.py').model.backbone.replacement.plan == found


def test_the_log_shows_how_the_search_goes(whole):
    runner, trace = whole
    lines = [json.loads(line) for file in Path(runner.work_dir).glob('*/vis_data/scalars.json')
             for line in file.read_text().splitlines()]
    curves = [line for line in lines if any(key.startswith('search/') for key in line)]
    assert [line['step'] for line in curves] == [2, 4, 6]
    assert all(line.keys() - {'step'} == {f'search/backbone.{name}' for name in OPEN} for line in curves)
    assert [curves[-1][f'search/backbone.{name}'] for name in OPEN] == trace.settled[-1].tolist()
    settled = [line['settled'] for line in lines if 'loss' in line][:STEPS]
    assert settled == [len(OPEN) - one.isnan().sum() for one in trace.settled] and settled[-1] == len(OPEN)
    text = '\n'.join(file.read_text() for file in Path(runner.work_dir).glob('*/*.log'))
    assert text.count('the search has ended') == 1
    assert f'dict(type=\'Blocks\', blocks={plan_of(runner.model)})' in text
    assert f'{Path(runner.cfg.filename).stem}_found.py' in text


# Resuming

def test_a_killed_search_resumes_and_ends_like_the_undisturbed_one(config, whole, tmp_path):
    reference, expected = whole
    train(config, tmp_path, stop=5, default_hooks__checkpoint__by_epoch=False, default_hooks__checkpoint__interval=3)
    assert [file.name for file in tmp_path.glob('*.pth')] == ['iter_3.pth']  # in the middle of an epoch
    assert not list(tmp_path.glob('*_found.py'))
    runner, trace = train(config, tmp_path, resume='auto')
    assert trace.gates == expected.gates[3:]
    assert 0 < trace.settled[0].isnan().sum() < len(OPEN)
    assert same(trace.policy.state_dict() | dict(settled=0), expected.policy.state_dict() | dict(settled=0))
    assert torch.equal(trace.settled[-1], expected.settled[-1])
    assert_same_end(runner, reference)
    found = Config.fromfile(tmp_path / f'{Path(config).stem}_found.py')
    assert (found.load_from, found.resume) == (None, False)  # those were for the run that found the plan


def test_after_the_search_a_run_resumes_with_the_plan_and_again(config, whole, tmp_path):
    reference, _ = whole
    train(config, tmp_path, resume=f'{reference.work_dir}/epoch_3.pth', stop=9)
    runner, trace = train(config, tmp_path, resume='auto')
    assert trace.gates == []
    assert_same_end(runner, reference)


# With what runs have

BY_ITERATIONS = SEARCH.replace('params=0.8)', 'params=0.8), iters=5') + '''
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=7, val_begin=9)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=4, max_keep_ckpts=-1))
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=7)]
'''


def test_by_iterations_in_mixed_precision_with_accumulated_gradients(write, folder, monkeypatch):
    """An odd number of steps leaves gradients that are not used yet when the search ends."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    runner, trace = train(write(BY_ITERATIONS), folder / 'amp', optim_wrapper__type='AmpOptimWrapper',
                          optim_wrapper__dtype='bfloat16', optim_wrapper__accumulative_counts=2)
    assert isinstance(runner.optim_wrapper, AmpOptimWrapper)
    assert (len(trace.gates), runner.iter) == (5, 7)
    assert_learned(runner)
    assert all(parameter.dtype == torch.float32 for parameter in runner.model.parameters())
    assert not torch.equal(trace.scores[-2], trace.scores[-1])


@pytest.fixture(scope='module')
def pretrained(write, folder, randomise_) -> Path:
    """A baseline's checkpoint."""
    baseline = build_model(load_config(write('', 'atss_r34_fpn_digits.py')))
    torch.save(dict(state_dict=randomise_(baseline).state_dict()), folder / 'baseline.pth')
    return folder / 'baseline.pth'


EVAL = EPOCH_RUN.replace('norm_eval=False', 'norm_eval=True')
"""The usual fine-tuning: frozen statistics."""


@pytest.fixture(scope='module')
def from_baseline(write, folder, pretrained) -> tuple[Runner, Trace]:
    """A run with frozen statistics from a baseline's weights, and a slow average of it."""
    return train(write(EVAL + EMA.format(0.0002, 1, True)), folder / 'from_baseline', load_from=str(pretrained),
                 train_cfg__max_epochs=4)


def test_computing_layers_begin_with_the_baselines_weights(from_baseline, pretrained):
    _, trace = from_baseline
    coefficients = {name: value for name, value in trace.fitted.items() if name.endswith('.replaced.coeff')}
    assert [name.removeprefix('backbone.').removesuffix('.replaced.coeff') for name in coefficients] == OPEN
    assert all(value.tolist() == [0.5, 0.5] for value in coefficients.values())
    given = read_checkpoint(str(pretrained))['state_dict']
    for name, value in trace.fitted.items():
        if '.replaced.' not in name or name.endswith(('bn1.weight', 'bn2.bias')):
            assert torch.equal(value, given[name.replace('.replaced.', '.')]), name


def test_frozen_statistics_are_recalibrated_before_the_search_and_when_it_ends(from_baseline, pretrained):
    runner, trace = from_baseline
    given = read_checkpoint(str(pretrained))['state_dict']
    before = {name: value for name, value in trace.before['values'].items() if name.endswith('running_mean')}
    for name, value in before.items():
        assert torch.equal(value, trace.fitted[name]), name
        assert torch.equal(value, given[name.replace('.replaced.', '.')]) == ('.replaced.' not in name), name
    average = hook_of(runner, EMAHook).ema_model.module.state_dict()
    for name, layer in computing_layers(runner.model).items():
        mean = trace.after['values'][f'{name}.bn1.running_mean']
        assert not torch.equal(mean, before[f'{name}.replaced.bn1.running_mean']), name
        assert torch.allclose(average[f'{name}.bn1.running_mean'], mean, rtol=1e-3), name
        assert not layer.norm_stale
    text = '\n'.join(file.read_text() for file in Path(runner.work_dir).glob('*/*.log'))
    counts = [2 * len(OPEN), 2 * len(computing_layers(runner.model))]
    assert [f'recalibrated {count} BatchNorms' in text for count in counts] == [True, True]
    assert text.count('recalibrated') == 2
    assert_learned(runner)


def test_a_resumed_search_does_not_recalibrate_again(from_baseline, folder):
    reference, expected = from_baseline
    runner, trace = train(reference.cfg.filename, folder / 'eval_resumed', train_cfg__max_epochs=4,
                          resume=f'{reference.work_dir}/epoch_1.pth')
    assert same(trace.scores, expected.scores[2:])
    assert_same_end(runner, reference)


def test_a_run_by_mmengines_runner_without_a_config(write, tmp_path):
    """As from Python code: the runner gets objects and dicts."""
    cfg = add_rl_defaults_(load_config(write(EPOCH_RUN), {'train_cfg.max_epochs': 2}))
    runner = Runner(
        build_model(cfg), str(tmp_path), default_scope='mmdet', train_dataloader=cfg.train_dataloader,
        train_cfg=cfg.train_cfg, optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[SearchHook()], experiment_name=f'search_{os.getpid()}_{next(names)}')
    runner.train()
    assert searching(runner) is None
    assert computing_layers(runner.model)


# Two processes

def work(rank: int, world: int, config: str, folder: Path) -> None:
    """One process of a run under DDP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank,
                                         world_size=world, timeout=timedelta(seconds=180))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    trace, images = Trace(), Images()
    cfg = add_rl_defaults_(load_config(config, dict(experiment_name='ddp'), str(folder / 'work'), 'pytorch'))
    runner = build_runner(cfg)
    runner.register_hook(trace)
    runner.register_hook(images)
    runner.train()
    held = {id(parameter) for group in runner.optim_wrapper.optimizer.param_groups for parameter in group['params']}
    torch.save(dict(
        gates=trace.gates, scores=trace.scores, settled=trace.settled,
        images=images.seen, plan=plan_of(plain(runner)), state=dict(plain(runner).state_dict()),
        optimizer=runner.optim_wrapper.optimizer.state_dict(), unused=(trace.before['unused'], trace.after['unused']),
        wrapped_anew=trace.before['wrapper']() is not runner.model, old_is_gone=trace.before['wrapper']() is None,
        holds=held == {id(parameter) for parameter in runner.model.parameters()}, iter=runner.iter),
        folder / f'rank{rank}.pt')
    torch.distributed.destroy_process_group()


class Images(Hook):
    """Which images each iteration sees."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.seen.append([sample.img_id for sample in data_batch['data_samples']])


@pytest.fixture(scope='module')
def processes(write, folder, pretrained) -> list[dict]:
    """What two processes leave, and the folder of their run."""
    own = folder / 'ddp'
    own.mkdir()
    config = write(EVAL.replace(f'max_epochs={EPOCHS}', 'max_epochs=3').replace(
        "params=0.8)", "params=0.8), epochs=2") + f"load_from = '{pretrained}'\nfind_unused_parameters = True\n"
                   "train_dataloader['dataset']['num_images'] = 8\n")
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), 'CUDA_VISIBLE_DEVICES': '',
                   'OMP_NUM_THREADS': '1'}
    running = [subprocess.Popen([sys.executable, __file__, str(rank), str(WORLD), config, str(own)], cwd=own,
                                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for rank in range(WORLD)]
    try:
        logs = [process.communicate(timeout=400)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * WORLD, '\n'.join(log[-4000:] for log in logs)
    return [torch.load(own / f'rank{rank}.pt', weights_only=False) for rank in range(WORLD)]


def test_processes_take_the_same_decisions_although_they_see_different_data(processes):
    one, other = processes
    assert all(set(mine).isdisjoint(others) for mine, others in zip(one['images'], other['images'], strict=True))
    assert len(one['gates']) == 4
    for name in ('gates', 'scores', 'settled', 'plan'):
        assert same([str(one[name])], [str(other[name])]), name
    assert not one['settled'][-1].isnan().any()


def test_processes_end_with_the_same_weights_and_a_ddp_of_their_own(processes):
    """Made anew for the parameters that are left; the old one and its buckets are gone."""
    one, other = processes
    assert one['iter'] == other['iter'] == 6
    assert same(one['state'], other['state'])
    assert same(one['optimizer'], other['optimizer'])
    for each in processes:
        assert each['unused'] == (True, False)
        assert each['wrapped_anew'] and each['holds'] and each['old_is_gone']


def test_only_the_first_process_writes_the_found_config(processes, folder):
    [found] = (folder / 'ddp' / 'work').glob('*_found.py')
    cfg = Config.fromfile(found)
    assert cfg.model.backbone.replacement.plan.blocks == processes[0]['plan']
    assert not (cfg.get('model_wrapper_cfg') or {}).get('find_unused_parameters', False)
    build_model(cfg).load_state_dict(processes[0]['state'], strict=True)


# Mistakes

def refused(cfg: Config) -> str:
    """The complaint about a run before it begins; nothing was written."""
    before = sorted(Path(cfg.work_dir).parent.rglob('*'))
    with pytest.raises(UserError) as caught:
        check_training(add_rl_defaults_(cfg))
    assert sorted(Path(cfg.work_dir).parent.rglob('*')) == before
    assert '\n' not in str(caught.value)
    return str(caught.value)


PLAN = 'model.backbone.replacement.plan'


@pytest.mark.parametrize(('options', 'complaint'), [
    ({f'{PLAN}.epochs': 7}, 'the search of 7 epochs is longer than the run of 6; shorten it'),
    ({'compile': True}, "can't be compiled"),
    ({'runner_type': 'FlexibleRunner'}, 'not with FlexibleRunner'),
    ({'model_wrapper_cfg': dict(type='MMFullyShardedDataParallel')}, 'not with replaced or folded blocks'),
    ({'model_wrapper_cfg': dict(type='MMDistributedDataParallel', static_graph=True)}, "isn't static"),
    ({f'{PLAN}.budget': dict(params=0.1)}, "the budget can't be reached: with 8 blocks replaced"),
])
def test_a_search_that_cannot_be_run_is_refused_before_anything_is_written(write, tmp_path, options, complaint):
    assert complaint in refused(load_config(write(EPOCH_RUN), options, str(tmp_path / 'work')))


def test_a_search_with_mmdetections_checkpoints_under_ddp_is_refused(write, tmp_path):
    options = {'model.backbone.with_cp': True, 'model.backbone.replacement.gradient.mode': 'detached'}
    cfg = load_config(write(EPOCH_RUN), options, str(tmp_path / 'work'), launcher='pytorch')
    assert 'mark a variable ready twice; set with_cp=False until the plan is found' in refused(cfg)


@pytest.mark.parametrize(('length', 'complaint'), [
    ('iters=9', 'the search of 9 iters is longer than the run of 8; shorten it'),
    ('epochs=1', 'the training counts iterations, not epochs; give the search iters=...')])
def test_a_search_that_does_not_fit_a_run_by_iterations_is_refused(write, tmp_path, length, complaint):
    more = SEARCH.replace('params=0.8)', f'params=0.8), {length}') + (
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=8)\n")
    assert complaint in refused(load_config(write(more), work_dir=str(tmp_path / 'work')))


def test_two_learned_plans_are_refused(write, tmp_path):
    cfg = load_config(write(EPOCH_RUN), work_dir=str(tmp_path / 'work'))
    cfg.model = dict(type='SemiBaseDetector', detector=cfg.model, data_preprocessor=cfg.model.data_preprocessor,
                     semi_train_cfg={}, semi_test_cfg=dict(predict_on='teacher'))
    complaint = refused(cfg)
    assert 'student.backbone' in complaint and 'teacher.backbone' in complaint
    assert 'have a search each, and a run has one' in complaint


def test_resuming_what_has_no_search_is_refused(write, tmp_path, pretrained):
    checkpoint = read_checkpoint(str(pretrained)) | dict(meta=dict(epoch=1, iter=3), message_hub={})
    torch.save(checkpoint, tmp_path / 'baseline.pth')
    runner = start(write(EPOCH_RUN), tmp_path / 'work', resume=str(tmp_path / 'baseline.pth'))
    with pytest.raises(UserError, match=r'^resume: the checkpoint has no state of a search.*load_from') as caught:
        runner.train()
    assert '\n' not in str(caught.value)


def test_resuming_a_search_of_another_length_is_refused(config, whole, tmp_path):
    complaint = 'the search was to take 6 steps and would now take 8; resume with the settings'
    with pytest.raises(UserError, match=f'^resume: {complaint}'):
        start(config, tmp_path, resume=f'{whole[0].work_dir}/epoch_1.pth', train_cfg__max_epochs=8).train()


def test_testing_what_was_saved_during_the_search_is_refused(config, whole, tmp_path):
    checkpoint = f'{whole[0].work_dir}/epoch_1.pth'
    cfg = load_config(config, work_dir=str(tmp_path / 'work'))
    take_found_(cfg, checkpoint)
    with pytest.raises(UserError, match="wasn't saved after the search.*train until the search has ended"):
        check_testing(cfg, checkpoint)
    assert list(tmp_path.iterdir()) == []


def test_testing_a_replaced_model_of_which_nobody_knows_what_was_found_is_refused(config, whole, tmp_path):
    saved = read_checkpoint(f'{whole[0].work_dir}/epoch_{EPOCHS}.pth')
    torch.save(saved['state_dict'], tmp_path / 'weights.pth')
    with pytest.raises(UserError, match=r'weights have none for .* after a search .* use the config .*_found\.py'):
        check_testing(load_config(config, work_dir=str(tmp_path / 'work')), str(tmp_path / 'weights.pth'))


def test_a_checkpoint_after_the_search_does_not_begin_another_one(whole, config, tmp_path):
    """load_from isn't resume: the config still asks for a search, which the found weights don't fit."""
    reference, _ = whole
    complaint = refused(load_config(config, dict(load_from=f'{reference.work_dir}/epoch_4.pth'),
                                    str(tmp_path / 'work')))
    assert 'epoch_4.pth' in complaint


if __name__ == '__main__':
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
