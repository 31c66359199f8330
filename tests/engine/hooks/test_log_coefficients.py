"""The coefficients of replaced blocks are in the log: at the start, every so often, and at the end."""
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

from rl_mmdet.engine import LogCoefficientsHook, load_config
from rl_mmdet.engine.config import add_rl_defaults_
from rl_mmdet.replacement import replace_blocks_

REPLACED = ('backbone.layer1.1', 'backbone.layer2.1', 'backbone.layer2.3')
KEYS = {f'replacement/{name}/{letter}' for name in REPLACED for letter in 'ab'}


class Model(BaseModel):
    """A backbone that is pulled to zero."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: torch.Tensor, mode: str) -> dict[str, torch.Tensor]:
        return dict(loss=self.backbone(inputs).square().mean())


@pytest.fixture
def model(toy_net) -> Callable[..., Model]:
    """A replaced ToyNet, or the baseline with ``plan=None``."""
    def build(plan: str | None = 'EveryKth', **settings) -> Model:
        backbone = toy_net()
        if plan is not None:
            replace_blocks_(backbone, dict(plan=dict(type=plan, k=2), **settings))
        return Model(backbone)
    return build


@pytest.fixture
def log(tmp_path) -> Callable[..., list[dict]]:
    """The lines that a training of so many iterations writes, by the hook alone."""
    def train(model: nn.Module, iters: int = 7, interval: int = 3, start: int = 0) -> list[dict]:
        backend = dict(type='LocalVisBackend')
        visualizer = Visualizer(name=f'test_{tmp_path.name}', vis_backends=[backend], save_dir=str(tmp_path))
        runner = SimpleNamespace(model=model, iter=start, max_iters=iters, visualizer=visualizer)
        hook = LogCoefficientsHook(interval)
        hook.before_train(runner)
        while runner.iter < iters:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith('coeff'):
                        parameter += 1
            hook.after_train_iter(runner, runner.iter)
            runner.iter += 1
        return lines(tmp_path)
    return train


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for path in folder.glob('**/scalars.json') for line in path.read_text().splitlines()]


def steps(written: list[dict]) -> list[int]:
    return [line['step'] for line in written]


def test_start_every_interval_and_end_are_written(model, log):
    assert steps(log(model())) == [0, 3, 6, 7]


def test_an_end_on_the_interval_is_written_once(model, log):
    assert steps(log(model(), iters=6)) == [0, 3, 6]


def test_a_resumed_training_does_not_write_the_start_again(model, log):
    assert steps(log(model(), start=4)) == [6, 7]


def test_values_are_the_layers_after_each_step(model, log):
    net = model()
    with torch.no_grad():
        net.backbone.layer2[1].coeff.copy_(torch.tensor([0.25, -2]))
    written = log(net, iters=2, interval=1)
    assert [line['replacement/backbone.layer2.1/a'] for line in written] == [0.25, 1.25, 2.25]
    assert [line['replacement/backbone.layer2.1/b'] for line in written] == [-2, -1, 0]
    assert written[0]['replacement/backbone.layer2.3/a'] == 0.5


def test_a_line_has_both_numbers_of_all_replaced_blocks(model, log):
    assert log(model())[0].keys() == KEYS | {'step'}


@pytest.mark.parametrize('fusion', ['ChannelFusion', 'TransformFusion'])
def test_of_more_pairs_the_mean_is_written(model, log, fusion):
    net = model(fusion=dict(type=fusion))
    coeff = net.backbone.layer2[1].coeff
    assert coeff.shape[1] > 1
    torch.nn.init.normal_(coeff)
    expected = coeff.detach().mean(1).tolist()
    line = log(net)[0]
    assert [line[f'replacement/backbone.layer2.1/{letter}'] for letter in 'ab'] == pytest.approx(expected)


@pytest.mark.parametrize('settings', [
    dict(plan=None), dict(fusion=dict(type='SharedWeights')), dict(fusion=dict(type='OwnWeights')),
    dict(operator=dict(type='Skip'))], ids=['baseline', 'shared', 'own', 'skip'])
def test_a_model_without_coefficients_writes_nothing(model, log, settings):
    assert log(model(**settings)) == []


def test_names_have_no_prefix_of_a_wrapper(model, monkeypatch):
    """As DDP wraps the model, but without processes."""
    written = []
    monkeypatch.setattr(MMDistributedDataParallel, '__init__', lambda self: nn.Module.__init__(self))
    wrapper = MMDistributedDataParallel()
    wrapper.module = model()
    visualizer = SimpleNamespace(add_scalars=lambda scalars, step: written.append(scalars))
    LogCoefficientsHook().before_train(SimpleNamespace(model=wrapper, iter=0, visualizer=visualizer))
    assert written[0].keys() == KEYS


@pytest.mark.parametrize('interval', [0, -1, 1.5, '3', True, None])
def test_wrong_interval_is_refused(interval):
    with pytest.raises(ValueError, match='LogCoefficientsHook: interval must be an integer of at least 1, got'):
        LogCoefficientsHook(interval)


@pytest.mark.parametrize('by_epoch', [True, False])
def test_in_a_training_by_mmengine_the_last_line_has_the_trained_values(model, tmp_path, by_epoch):
    net, images = model(), [dict(inputs=image) for image in torch.randn(10, 3, 8, 8)]
    runner = Runner(net, str(tmp_path), default_scope='mmdet', train_dataloader=DataLoader(images, batch_size=2),
                    train_cfg=dict(by_epoch=True, max_epochs=1) if by_epoch else dict(by_epoch=False, max_iters=5),
                    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)), experiment_name=tmp_path.name,
                    default_hooks=dict(checkpoint=None), custom_hooks=[LogCoefficientsHook(interval=2)])
    runner.train()
    written = [line for line in lines(tmp_path) if line.keys() >= KEYS]
    assert steps(written) == [0, 2, 4, 5]
    found = [written[-1][f'replacement/backbone.layer2.3/{letter}'] for letter in 'ab']
    assert found == net.backbone.layer2[3].coeff.tolist() != [0.5, 0.5]


def test_the_tools_add_it_to_a_config_with_a_replacement_only(tiny_config):
    added = [[hook['type'] for hook in add_rl_defaults_(load_config(tiny_config(name))).custom_hooks]
             for name in ('atss_rl-r34-k2_fpn_digits.py', 'atss_r34_fpn_digits.py')]
    assert ['LogCoefficientsHook' in hooks for hooks in added] == [True, False]
