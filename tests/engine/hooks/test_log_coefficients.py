"""The coefficients of replaced blocks are in the log: at the start, every so often, and at the end."""
import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from rl_mmdet.engine import LogCoefficientsHook
from rl_mmdet.replacement import replace_blocks_

BLOCKS = ('backbone.layer1.1', 'backbone.layer2.1', 'backbone.layer2.3')
KEYS = {f'replacement/{name}/{letter}' for name in BLOCKS for letter in 'ab'}


class Model(BaseModel):
    """A backbone that is pulled to zero."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: torch.Tensor, mode: str) -> dict[str, torch.Tensor]:
        return dict(loss=self.backbone(inputs).square().mean())


@pytest.fixture
def model(toy_net) -> Callable[..., Model]:
    """A replaced ToyNet."""
    def build(**settings) -> Model:
        backbone = toy_net()
        replace_blocks_(backbone, dict(plan=dict(type='EveryKth', k=2), **settings))
        return Model(backbone)
    return build


def log(model: nn.Module, iters: int = 7, start: int = 0) -> dict[int, dict]:
    """What is written in iterations that add 1 to every coefficient, by step."""
    written = {}
    visualizer = SimpleNamespace(add_scalars=lambda scalars, step: written.setdefault(step, scalars))
    runner = SimpleNamespace(model=model, iter=start, max_iters=iters, visualizer=visualizer)
    hook = LogCoefficientsHook(interval=3)
    hook.before_train(runner)
    while runner.iter < iters:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith('coeff'):
                    parameter += 1
        hook.after_train_iter(runner, runner.iter)
        runner.iter += 1
    return written


@pytest.mark.parametrize(('start', 'iters', 'steps'), [(0, 7, [0, 3, 6, 7]), (0, 6, [0, 3, 6]), (4, 7, [6, 7])],
                         ids=['whole', 'end on the interval', 'resumed'])
def test_start_every_interval_and_end_are_written_with_the_values_of_then(model, start, iters, steps):
    net = model()
    with torch.no_grad():
        net.backbone.layer2[1].coeff.copy_(torch.tensor([0.25, -2]))
    written = log(net, iters, start)
    assert list(written) == steps
    assert all(scalars.keys() == KEYS for scalars in written.values())
    found = [(scalars['replacement/backbone.layer2.1/a'], scalars['replacement/backbone.layer2.1/b'])
             for scalars in written.values()]
    assert found == [(0.25 + step - start, -2 + step - start) for step in steps]


def test_of_more_pairs_the_mean_is_written(model):
    net = model(fusion=dict(type='TransformFusion'))
    coeff = net.backbone.layer2[1].coeff
    assert coeff.shape[1] > 1
    nn.init.normal_(coeff)
    expected = coeff.detach().mean(1).tolist()
    first = log(net)[0]
    assert [first[f'replacement/backbone.layer2.1/{letter}'] for letter in 'ab'] == pytest.approx(expected)


def test_models_without_coefficients_write_nothing(model, toy_net):
    assert log(Model(toy_net())) == {}
    for settings in (dict(fusion=dict(type='SharedWeights')), dict(fusion=dict(type='OwnWeights')),
                     dict(operator=dict(type='Skip'))):
        assert log(model(**settings)) == {}


def test_names_have_no_prefix_of_a_wrapper(model, monkeypatch):
    """As DDP wraps the model, but without processes."""
    monkeypatch.setattr(MMDistributedDataParallel, '__init__', lambda self: nn.Module.__init__(self))
    wrapper = MMDistributedDataParallel()
    wrapper.module = model()
    assert log(wrapper)[0].keys() == KEYS


@pytest.mark.parametrize('interval', [0, 1.5, True, None])
def test_wrong_interval_is_refused(interval):
    with pytest.raises(ValueError, match='LogCoefficientsHook: interval must be an integer of at least 1, got'):
        LogCoefficientsHook(interval)


def test_in_a_training_by_mmengine_the_last_line_has_the_trained_values(model, tmp_path):
    net, images = model(), [dict(inputs=image) for image in torch.randn(10, 3, 8, 8)]
    runner = Runner(net, str(tmp_path), default_scope='mmdet', train_dataloader=DataLoader(images, batch_size=2),
                    train_cfg=dict(by_epoch=True, max_epochs=1), default_hooks=dict(checkpoint=None),
                    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)), experiment_name=tmp_path.name,
                    custom_hooks=[LogCoefficientsHook(interval=2)])
    runner.train()
    lines = [json.loads(line) for path in tmp_path.glob('**/scalars.json') for line in path.read_text().splitlines()]
    written = [line for line in lines if line.keys() >= KEYS]
    assert [line['step'] for line in written] == [0, 2, 4, 5]
    values = [written[-1][f'replacement/backbone.layer2.3/{letter}'] for letter in 'ab']
    assert values == net.backbone.layer2[3].coeff.tolist() != [0.5, 0.5]
