"""A run that learns its plan: it searches, turns into the ordinary replaced run, and can be resumed at any time.

Run as a script, ``test_search.py RANK WORLD CONFIG FOLDER``, this file is one of two processes of DDP.
"""
import itertools
import json
import math
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
from rl_mmdet.engine.options import set_resume_
from rl_mmdet.replacement import ComputingLayer, computing_layers

WORLD = 2
EPOCHS, STEPS = 6, 6
"""Of a run of two iterations an epoch; the search is its first half."""
OPEN = ['layer1.1', 'layer2.1', 'layer2.2', 'layer3.1', 'layer3.2', 'layer3.3', 'layer3.4', 'layer4.1']
"""Blocks of the tiny backbone that can be replaced."""
SEARCH = '''
plan = dict(_delete_=True, type='LearnedPlan', budget=dict(params=0.8))
model = dict(
    backbone=dict(base_channels=4, norm_eval=False, replacement=dict(plan=plan)), neck=dict(in_channels=[4, 8, 16, 32]))
custom_hooks = [dict(type='SearchHook', interval=2), dict(type='RecalibrateNormsHook', num_batches=2)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=-1))
train_dataloader['dataset']['num_images'] = 4
'''
"""ATSS draws nothing at random, so equal runs are equal bit for bit."""
EPOCH_RUN = SEARCH + f'train_cfg = dict(max_epochs={EPOCHS}, val_interval=2)\n'
GROUPS = "optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0., custom_keys={'backbone': dict(lr_mult=0.5)}))\n"
"""Makes MMEngine's constructor give every parameter its own group."""
names = itertools.count()


class Killed(Exception):
    """Ends a run in its middle."""


class Trace(Hook):
    """What happens in a run.

    Args:
        stop: kills the run before this iteration.

    Attributes:
        gates, scores, settled, probabilities: of the policy, in each iteration.
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
            self.settled.append(list(self.policy.settled))
        if not self.after and searching(runner) is None:
            self.after = moment(runner)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        search = searching(runner)
        if search is not None:
            self.shown.append(([block.gate.replace for block in search.space.blocks], search.best()))


class Average(Hook):
    """The moving average of a model's tensors, kept by their identity: of those that are there from start to end."""
    priority = 'LOWEST'

    def __init__(self, buffers: bool) -> None:
        self.buffers, self.average, self.kept = buffers, {}, {}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        ema = next(hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook))
        momentum = (1 - ema.momentum) * math.exp(-float(ema.steps) / ema.gamma) + ema.momentum
        for name, tensor in tensors(plain(runner), self.buffers).items():
            key = id(tensor)
            self.kept[key] = tensor
            if key not in self.average:
                assert ema.steps == 1, name
                self.average[key] = tensor.detach().clone()
            elif ema.steps > 1 and tensor.is_floating_point():
                self.average[key].lerp_(tensor.detach(), momentum)


def tensors(model: nn.Module, buffers: bool) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True) if buffers else dict(model.named_parameters())


def plain(runner: Runner) -> nn.Module:
    return getattr(runner.model, 'module', runner.model)


def hook_of(runner: Runner, kind: type[Hook]) -> Any:
    return next((hook for hook in runner.hooks if isinstance(hook, kind)), None)


def searching(runner: Runner) -> Any:
    hook = hook_of(runner, SearchHook)
    return hook and hook.search


def moment(runner: Runner) -> dict[str, Any]:
    """Objects and values of a run as they are now."""
    model, optimizer = plain(runner), runner.optim_wrapper.optimizer
    return dict(
        parameters=dict(model.named_parameters()), groups=[list(group['params']) for group in optimizer.param_groups],
        values_of=len(runner.optim_wrapper.param_groups),
        state={id(parameter): state['exp_avg'] for parameter, state in optimizer.state.items()},
        schedulers=[(len(each.base_values), len(each.get_last_value())) for each in runner.param_schedulers],
        stale=[layer.norm_stale for layer in computing_layers(model).values()],
        values={name: value.clone() for name, value in model.state_dict().items()},
        wrapper=weakref.ref(runner.model), unused=getattr(runner.model, 'find_unused_parameters', None),
        classes=[type(module) for module in model.modules()], model=weakref.ref(model))


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
        set_resume_(cfg, resume)
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
    return write(EPOCH_RUN + GROUPS)


@pytest.fixture(scope='module')
def whole(config, folder) -> tuple[Runner, Trace]:
    """A run that nobody has disturbed."""
    return train(config, folder / f'whole{next(names)}')


# ---------------------------------------------------------------------------------------------------------- a run


def test_the_first_half_searches_and_the_second_trains_the_replaced_model(whole):
    runner, trace = whole
    assert (len(trace.gates), runner.iter) == (STEPS, 2 * STEPS)
    assert len({tuple(gates) for gates in trace.gates}) > 2
    assert_learned(runner)
    assert isinstance(runner.model.backbone.layer1[0], type(runner.model.backbone.layer1[2]))
    assert plan_of(runner.model) == hook_of(runner, SearchHook).found['plan']['blocks']


def test_all_gates_are_settled_one_by_one_in_the_second_half_of_the_search(whole):
    _, trace = whole
    counts = [sum(gate is not None for gate in settled) for settled in trace.settled]
    assert counts == [math.floor(len(OPEN) * max(0, 2 * step / STEPS - 1)) for step in range(1, STEPS + 1)]
    for earlier, later in itertools.pairwise(trace.settled):
        assert all(new == old for old, new in zip(earlier, later, strict=True) if old is not None)


def test_the_choice_is_the_settled_gates_and_keeps_the_budget(whole):
    runner, trace = whole
    chosen = [name for name, gate in zip(OPEN, trace.settled[-1], strict=True) if gate]
    assert [f'{chain}.{index}' for chain, blocks in plan_of(runner.model).items() for index in blocks] == chosen
    sizes = [sum(parameter.numel() for parameter in build_model(cfg).backbone.parameters()) for cfg in (
        runner.cfg, load_config(runner.cfg.filename, {'model.backbone.replacement': None}))]
    assert 0.6 < sizes[0] / sizes[1] <= 0.8


def test_weights_of_the_chosen_branches_go_on_as_they_are(whole):
    _, trace = whole
    before, after = trace.before['parameters'], trace.after['parameters']
    for name, parameter in after.items():
        searched = [other for other, candidate in before.items() if candidate is parameter]
        assert [other.replace('.replaced.', '.') for other in searched] == [name]
    assert len(after) < len(before)


def test_the_optimizer_holds_the_models_parameters_and_keeps_the_state_of_those_that_stay(whole):
    _, trace = whole
    held = [parameter for group in trace.after['groups'] for parameter in group]
    assert len(held) == len(trace.after['parameters'])
    assert {id(parameter) for parameter in held} == {id(p) for p in trace.after['parameters'].values()}
    assert all(trace.after['groups'])
    assert set(trace.after['state']) <= {id(parameter) for parameter in held}
    both = set(trace.before['state']) & set(trace.after['state'])
    assert both == set(trace.before['state']) & {id(parameter) for parameter in held}
    assert all(trace.after['state'][key] is trace.before['state'][key] for key in both)
    coefficients = [id(p) for name, p in trace.after['parameters'].items() if name.endswith('.coeff')]
    assert coefficients and set(coefficients) <= both


def test_param_schedulers_stay_in_step_with_the_groups(whole):
    runner, trace = whole
    groups = runner.optim_wrapper.optimizer.param_groups
    assert trace.after['schedulers'] == [(trace.after['values_of'], ) * 2] * len(runner.param_schedulers)
    assert trace.before['schedulers'] == [(trace.before['values_of'], ) * 2] * len(runner.param_schedulers)
    assert trace.after['values_of'] < trace.before['values_of']
    for scheduler in runner.param_schedulers:
        assert scheduler.base_values == [group['initial_lr'] for group in runner.optim_wrapper.param_groups]
    rate = runner.cfg.optim_wrapper.optimizer.lr
    own = {id(p): name for name, p in runner.model.named_parameters()}
    for group in groups:
        name = own[id(group['params'][0])]
        assert group['initial_lr'] == rate * (0.5 if name.startswith('backbone') else 1.)
    ratios = [group['lr'] / group['initial_lr'] for group in groups]
    assert ratios == pytest.approx([ratios[0]] * len(groups), rel=1e-9)


def test_validation_during_the_search_shows_the_choice_of_the_moment(whole):
    _, trace = whole
    assert len(trace.shown) == 1
    for shown, best in trace.shown:
        assert shown == best
        assert any(shown)


def test_the_found_config_is_an_ordinary_one_whose_model_loads_the_last_checkpoint(whole):
    runner, _ = whole
    work = Path(runner.work_dir)
    stem = Path(runner.cfg.filename).stem
    found = Config.fromfile(work / f'{stem}_found.py')
    assert found.model.backbone.replacement.plan == dict(type='Blocks', blocks=plan_of(runner.model))
    assert [hook.type for hook in found.custom_hooks] == ['RecalibrateNormsHook', 'FiniteLossHook',
                                                          'LogCoefficientsHook']
    assert found.find_unused_parameters is False
    model = build_model(found)
    model.load_state_dict(read_checkpoint(str(work / f'epoch_{EPOCHS}.pth'))['state_dict'], strict=True)
    assert not list(work.glob('*.part'))


def test_checkpoints_have_the_policys_state_and_then_the_plan(whole):
    runner, trace = whole
    files = [read_checkpoint(f'{runner.work_dir}/epoch_{epoch}.pth') for epoch in range(1, EPOCHS + 1)]
    assert ['search' in file for file in files] == [True, True, False, False, False, False]
    assert [file.get('found') for file in files] == [None] * 2 + [
        dict(plan=dict(type='Blocks', blocks=plan_of(runner.model)))] * 4
    for epoch, file in enumerate(files[:2], 1):
        assert file['search']['step'] == 2 * epoch
        assert torch.equal(file['search']['scores'], trace.scores[2 * epoch - 1])


def test_the_log_shows_how_the_search_goes(whole):
    runner, trace = whole
    lines = [json.loads(line) for file in Path(runner.work_dir).glob('*/vis_data/scalars.json')
             for line in file.read_text().splitlines()]
    curves = [line for line in lines if any(key.startswith('search/') for key in line)]
    assert [line['step'] for line in curves] == [2, 4, 6]
    assert all(line.keys() - {'step'} == {f'search/backbone.{name}' for name in OPEN} for line in curves)
    assert all(0 <= line[f'search/backbone.{name}'] <= 1 for line in curves for name in OPEN)
    assert [curves[-1][f'search/backbone.{name}'] for name in OPEN] == [float(gate) for gate in trace.settled[-1]]
    settled = [line['settled'] for line in lines if 'loss' in line][:STEPS]
    assert settled == [sum(gate is not None for gate in one) for one in trace.settled]
    text = '\n'.join(file.read_text() for file in Path(runner.work_dir).glob('*/*.log'))
    assert text.count('the search has ended') == 1
    assert f'dict(type=\'Blocks\', blocks={plan_of(runner.model)})' in text
    assert f'{Path(runner.cfg.filename).stem}_found.py' in text


# -------------------------------------------------------------------------------------------------------- resuming


def test_a_killed_search_resumes_and_ends_like_the_undisturbed_one(config, whole, tmp_path):
    reference, expected = whole
    _, first = train(config, tmp_path, stop=5)
    assert same(first.scores, expected.scores[:5])
    runner, trace = train(config, tmp_path, resume='auto')
    assert trace.gates == expected.gates[4:]
    assert trace.settled == expected.settled[4:]
    assert any(gate is not None for gate in trace.settled[0]) and None in trace.settled[0]
    assert same(trace.policy.state_dict(), expected.policy.state_dict())
    assert same(trace.scores, expected.scores[4:])
    assert plan_of(runner.model) == plan_of(reference.model)
    assert_same_end(runner, reference)


@pytest.mark.parametrize(('found', 'epoch'), [(False, 3), (True, 4)], ids=['search-config', 'found-config'])
def test_after_the_search_a_run_resumes_with_the_plan(config, whole, tmp_path, found, epoch):
    reference, _ = whole
    if found:
        config = str(Path(reference.work_dir) / f'{Path(config).stem}_found.py')
    runner, trace = train(config, tmp_path, resume=f'{reference.work_dir}/epoch_{epoch}.pth')
    assert trace.gates == []
    assert (hook_of(runner, SearchHook) is None) == found
    assert plan_of(runner.model) == plan_of(reference.model)
    assert_same_end(runner, reference)
    last = read_checkpoint(f'{tmp_path}/epoch_{EPOCHS}.pth')
    assert same(last['state_dict'], read_checkpoint(f'{reference.work_dir}/epoch_{EPOCHS}.pth')['state_dict'])


def test_a_run_resumed_twice_still_knows_its_plan(whole, config, tmp_path):
    """What resumed after the search saves can be resumed with the search's config again."""
    reference, _ = whole
    train(config, tmp_path, resume=f'{reference.work_dir}/epoch_4.pth', stop=10)
    runner, _ = train(config, tmp_path, resume='auto')
    assert_same_end(runner, reference)


def test_the_found_config_of_a_resumed_run_starts_afresh(config, whole, tmp_path):
    """Its load_from and resume were for the run that found the plan."""
    reference, _ = whole
    train(config, tmp_path, resume=f'{reference.work_dir}/epoch_2.pth', stop=7)
    found = Config.fromfile(tmp_path / f'{Path(config).stem}_found.py')
    assert (found.load_from, found.resume) == (None, False)


def test_a_run_by_iterations_is_searched_for_the_iterations_asked_for_and_resumes(write, folder):
    more = SEARCH.replace("params=0.8)", "params=0.8), iters=5") + (
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=7, val_interval=4)\n"
        "default_hooks = dict(checkpoint=dict(by_epoch=False, interval=4, max_keep_ckpts=-1))\n"
        "param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=7)]\n")
    config = write(more)
    reference, expected = train(config, folder / 'iters')
    assert (len(expected.gates), reference.iter) == (5, 7)
    assert_learned(reference)
    assert [shown == best for shown, best in expected.shown] == [True]
    runner, trace = train(config, folder / 'iters_resumed', resume=f'{reference.work_dir}/iter_4.pth')
    assert trace.gates == expected.gates[4:]
    assert same(trace.policy.state_dict(), expected.policy.state_dict())
    assert_same_end(runner, reference)


# ------------------------------------------------------------------------------------------- with what runs have


@pytest.fixture(scope='module', params=[False, True], ids=['parameters', 'buffers'])
def averaged(request, write, folder) -> tuple[Runner, Trace, Average]:
    """A run with an average of parameters, or of buffers as well."""
    ema = ("dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.1, gamma=10, "
           f'update_buffers={request.param})')
    mirror = Average(request.param)
    config = write(EPOCH_RUN.replace('custom_hooks = [', f'custom_hooks = [{ema}, '))
    return *train(config, folder / f'averaged{next(names)}', hooks=(mirror, )), mirror


def test_the_average_of_weights_follows_the_structure_and_its_values_go_on(averaged):
    runner, _, mirror = averaged
    average = hook_of(runner, EMAHook).ema_model
    assert [(name, type(module)) for name, module in average.module.named_modules()] == [
        (name, type(module)) for name, module in runner.model.named_modules()]
    assert list(average.avg_parameters) == list(tensors(runner.model, mirror.buffers))
    assert average.steps == 2 * STEPS
    own, differs = tensors(average.module, mirror.buffers), False
    for name, tensor in tensors(runner.model, mirror.buffers).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(own[name], mirror.average[id(tensor)], rtol=1e-6, atol=1e-7, msg=name)
            differs |= not torch.equal(own[name], tensor)
    assert differs
    last = read_checkpoint(f'{runner.work_dir}/epoch_{EPOCHS}.pth')
    assert all(torch.equal(last['state_dict'][name], value) for name, value in own.items())


def test_the_average_resumes(averaged, folder):
    reference, trace, mirror = averaged
    epoch = 3 if mirror.buffers else 2  # at the end of the search, or in it
    runner, resumed = train(reference.cfg.filename, folder / f'resumed{next(names)}',
                            resume=f'{reference.work_dir}/epoch_{epoch}.pth')
    assert resumed.gates == trace.gates[2 * epoch:]
    assert_same_end(runner, reference)


def test_mixed_precision_and_accumulated_gradients(write, folder, monkeypatch):
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    config = write(EPOCH_RUN)
    runner, trace = train(config, folder / 'amp', optim_wrapper__type='AmpOptimWrapper',
                          optim_wrapper__dtype='bfloat16', optim_wrapper__accumulative_counts=2,
                          train_cfg__max_epochs=4, train_cfg__val_begin=9)
    assert isinstance(runner.optim_wrapper, AmpOptimWrapper)
    assert (len(trace.gates), runner.iter) == (4, 8)
    assert_learned(runner)
    assert all(parameter.dtype == torch.float32 for parameter in runner.model.parameters())
    assert not torch.equal(trace.scores[-2], trace.scores[-1])


def test_accumulating_over_the_end_of_the_search(write, folder):
    """An odd number of steps leaves gradients that are not used yet when the search ends."""
    runner, trace = train(write(EPOCH_RUN), folder / 'accumulated', optim_wrapper__accumulative_counts=2,
                          train_cfg__max_epochs=3, train_cfg__val_begin=9, model__backbone__replacement__plan__iters=3)
    assert (len(trace.gates), runner.iter) == (3, 6)
    assert_learned(runner)


@pytest.fixture(scope='module')
def pretrained(write, folder, randomise_) -> Path:
    """A baseline's checkpoint."""
    baseline = build_model(load_config(write('', 'atss_r34_fpn_digits.py')))
    torch.save(dict(state_dict=randomise_(baseline).state_dict()), folder / 'baseline.pth')
    return folder / 'baseline.pth'


def statistics(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Running means of the computing layers, by names of the replaced model."""
    return {name.replace('.replaced.', '.'): value for name, value in values.items()
            if '.replaced.' in name and name.endswith('running_mean')}


EVAL = EPOCH_RUN.replace('norm_eval=False', 'norm_eval=True').replace(
    'plan=plan', "plan=plan, fusion=dict(type='ScalarFusion', pretrained='least_squares')")
"""The usual fine-tuning: frozen statistics; with coefficients that are fitted."""


@pytest.fixture(scope='module')
def from_baseline(write, folder, pretrained) -> tuple[Runner, Trace]:
    """A run with frozen statistics from a baseline's weights."""
    return train(write(EVAL), folder / 'from_baseline', load_from=str(pretrained), train_cfg__max_epochs=4)


def test_computing_layers_begin_with_the_baselines_weights(from_baseline, pretrained):
    runner, trace = from_baseline
    coefficients = {name: value for name, value in trace.fitted.items() if name.endswith('.replaced.coeff')}
    assert [name.removeprefix('backbone.').removesuffix('.replaced.coeff') for name in coefficients] == OPEN
    assert all((value - 0.5).abs().max() > 1e-4 for value in coefficients.values())
    given = read_checkpoint(str(pretrained))['state_dict']
    for name, value in trace.fitted.items():
        if '.replaced.' not in name:
            assert torch.equal(value, given[name]), name
        elif name.endswith(('bn1.weight', 'bn2.bias')):
            assert torch.equal(value, given[name.replace('.replaced.', '.')]), name


def test_frozen_statistics_are_recalibrated_before_the_search_and_when_it_ends(from_baseline, pretrained):
    runner, trace = from_baseline
    given = read_checkpoint(str(pretrained))['state_dict']
    start_, end = statistics(trace.fitted), statistics(trace.before['values'])
    assert len(start_) == 2 * len(OPEN)
    for name, value in start_.items():
        assert not torch.equal(value, given[name]), name
        assert torch.equal(value, end[name]), name
    changed = {name: not torch.equal(trace.after['values'][name], value) for name, value in end.items()
               if name.rpartition('.bn')[0] in computing_layers(runner.model)}
    assert changed and all(changed.values())
    assert trace.after['stale'] == [False] * len(computing_layers(runner.model))
    kept = [name for name in trace.after['values'] if name.endswith('running_mean') and name not in end]
    assert kept and all(torch.equal(trace.after['values'][name], given[name]) for name in kept)
    text = '\n'.join(file.read_text() for file in Path(runner.work_dir).glob('*/*.log'))
    counts = [2 * len(OPEN), 2 * len(computing_layers(runner.model))]
    assert [f'recalibrated {count} BatchNorms' in text for count in counts] == [True, True]
    assert text.count('recalibrated') == 2
    assert not any(norm.training for norm in runner.model.backbone.modules()
                   if isinstance(norm, nn.modules.batchnorm._BatchNorm))
    assert_learned(runner)


def test_a_resumed_search_does_not_recalibrate_again(from_baseline, folder):
    reference, expected = from_baseline
    runner, trace = train(reference.cfg.filename, folder / 'eval_resumed', train_cfg__max_epochs=4,
                          resume=f'{reference.work_dir}/epoch_1.pth')
    assert same(trace.scores, expected.scores[2:])
    assert_same_end(runner, reference)


def test_averaged_statistics_are_the_recalibrated_ones(write, folder, pretrained):
    """Else an average of frozen statistics would keep those of other neighbours for thousands of iterations."""
    ema = "dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0002, gamma=1, update_buffers=True)"
    runner, trace = train(write(EVAL.replace('custom_hooks = [', f'custom_hooks = [{ema}, ')), folder / 'eval_ema',
                          load_from=str(pretrained), train_cfg__max_epochs=2)
    average = hook_of(runner, EMAHook).ema_model.module.state_dict()
    for name in computing_layers(runner.model):
        own = runner.model.state_dict()[f'{name}.bn1.running_mean']
        assert torch.allclose(average[f'{name}.bn1.running_mean'], own, rtol=1e-3), name


def test_a_run_by_mmengines_runner_without_a_config(write, folder, tmp_path):
    """As from Python code: the runner gets objects and dicts."""
    cfg = add_rl_defaults_(load_config(write(EPOCH_RUN), {'train_cfg.max_epochs': 2}))
    runner = Runner(
        build_model(cfg), str(tmp_path), default_scope='mmdet', train_dataloader=cfg.train_dataloader,
        train_cfg=cfg.train_cfg, optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[SearchHook()], experiment_name=f'search_{os.getpid()}_{next(names)}')
    runner.train()
    assert searching(runner) is None
    assert [type(layer) for layer in computing_layers(runner.model).values()] == [
        ComputingLayer] * len(computing_layers(runner.model))
    assert computing_layers(runner.model)


# ------------------------------------------------------------------------------------------------------ two processes


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
        gates=trace.gates, scores=trace.scores, settled=trace.settled, policy=trace.policy.state_dict(),
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


def test_with_a_search_hook_of_its_own_ddp_knows_that_a_step_does_not_use_all_weights(write):
    cfg = add_rl_defaults_(load_config(write(EPOCH_RUN)))
    assert cfg.get('find_unused_parameters') is True


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
    for name in ('gates', 'scores', 'settled', 'policy', 'plan'):
        assert same(one[name], other[name]), name
    assert None not in one['settled'][-1]


def test_processes_end_with_the_same_weights_and_statistics(processes):
    one, other = processes
    assert one['iter'] == other['iter'] == 6
    assert any(not torch.equal(value, torch.zeros_like(value)) for value in one['state'].values())
    assert same(one['state'], other['state'])
    assert same(one['optimizer'], other['optimizer'])


def test_ddp_is_made_anew_for_the_parameters_that_are_left(processes):
    for one in processes:
        assert one['unused'] == (True, False)
        assert one['wrapped_anew'] and one['holds']


def test_the_old_ddp_and_its_buckets_are_gone(processes):
    assert all(one['old_is_gone'] for one in processes)


def test_only_the_first_process_writes_the_found_config(processes, folder):
    found = list((folder / 'ddp' / 'work').glob('*_found.py'))
    assert len(found) == 1
    cfg = Config.fromfile(found[0])
    assert cfg.model.backbone.replacement.plan.blocks == processes[0]['plan']
    assert not (cfg.get('model_wrapper_cfg') or {}).get('find_unused_parameters', False)
    model = build_model(cfg)
    model.load_state_dict(processes[0]['state'], strict=True)


# ------------------------------------------------------------------------------------------------------------ mistakes


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
    ({f'{PLAN}.epochs': 7}, 'the search of 7 epochs is longer than the run of 6 (train_cfg.max_epochs); shorten it'),
    ({f'{PLAN}.epochs': 1, f'{PLAN}.iters': 3}, 'both say how long the search is'),
    ({'compile': True}, "can't be compiled"),
    ({'compile': dict(backend='eager')}, "can't be compiled"),
    ({'runner_type': 'FlexibleRunner'}, 'not with FlexibleRunner'),
    ({'runner_type': 'FlexibleRunner', 'strategy': dict(type='FSDPStrategy')}, 'not with FlexibleRunner'),
    ({'model_wrapper_cfg': dict(type='MMFullyShardedDataParallel')}, 'not with MMFullyShardedDataParallel'),
    ({'model_wrapper_cfg': dict(type='MMDistributedDataParallel', static_graph=True)}, "isn't static"),
    ({f'{PLAN}.budget': dict(params=0.1)}, "the budget can't be reached: with 8 blocks replaced"),
    ({f'{PLAN}.budget': dict(params=1.2)}, 'must be above 0 and below 1'),
    ({'model.backbone.depth': 18}, 'blocks that can be replaced: none'),
])
def test_a_search_that_cannot_be_run_is_refused_before_anything_is_written(write, tmp_path, options, complaint):
    assert complaint in refused(load_config(write(EPOCH_RUN), options, str(tmp_path / 'work')))


@pytest.mark.parametrize(('length', 'complaint'), [
    ('iters=9', 'the search of 9 iters is longer than the run of 8 (train_cfg.max_iters); shorten it'),
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


def test_a_length_that_is_known_when_the_run_starts_is_refused_then(write, tmp_path):
    runner = start(write(EPOCH_RUN), tmp_path, model__backbone__replacement__plan__iters=13)
    with pytest.raises(UserError, match='the search of 13 .*is longer than the run of 12') as caught:
        runner.train()
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.glob('*.pth'))


def test_resuming_what_has_no_search_is_refused(write, tmp_path, pretrained):
    checkpoint = read_checkpoint(str(pretrained)) | dict(meta=dict(epoch=1, iter=3))
    torch.save(checkpoint, tmp_path / 'baseline.pth')
    runner = start(write(EPOCH_RUN), tmp_path / 'work', resume=str(tmp_path / 'baseline.pth'))
    with pytest.raises(UserError, match=r'^resume: the checkpoint has no state of a search.*load_from') as caught:
        runner.train()
    assert '\n' not in str(caught.value)


@pytest.fixture(scope='module')
def middle(write, folder) -> tuple[str, str]:
    """A config, and a checkpoint that was saved during its search."""
    config = write(EPOCH_RUN)
    train(config, folder / 'middle', stop=2)
    return config, str(folder / 'middle' / 'epoch_1.pth')


@pytest.mark.parametrize(('options', 'complaint'), [
    (dict(train_cfg__max_epochs=8), 'the search was to take 6 steps and would now take 8'),
    (dict(model__backbone__replacement__plan__iters=5), 'the search was to take 6 steps and would now take 5')])
def test_resuming_a_search_of_another_length_is_refused(middle, tmp_path, options, complaint):
    config, checkpoint = middle
    with pytest.raises(UserError, match=f'^resume: {complaint}; resume with the settings'):
        start(config, tmp_path, resume=checkpoint, **options).train()


def test_testing_what_was_saved_during_the_search_is_refused(middle, tmp_path):
    config, checkpoint = middle
    cfg = load_config(config, work_dir=str(tmp_path / 'work'))
    take_found_(cfg, checkpoint)
    with pytest.raises(UserError, match="wasn't saved after the search.*train until the search has ended"):
        check_testing(cfg, checkpoint)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_after_the_search_does_not_begin_another_one(whole, config, tmp_path):
    """load_from isn't resume: the config still asks for a search, which the found weights don't fit."""
    reference, _ = whole
    complaint = refused(load_config(config, dict(load_from=f'{reference.work_dir}/epoch_4.pth'),
                                    str(tmp_path / 'work')))
    assert 'epoch_4.pth' in complaint


if __name__ == '__main__':
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
