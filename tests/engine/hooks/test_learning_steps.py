"""LearningStepsHook: replaced blocks learn in the same iterations whether or not a run was interrupted."""
from types import SimpleNamespace

import pytest

from rl_mmdet.engine import LearningStepsHook
from rl_mmdet.models import RLResNet
from rl_mmdet.replacement import computing_layers


@pytest.fixture
def model():
    return RLResNet(depth=101, base_channels=4, replacement=dict(plan=dict(type='EveryKth', k=2),
                                                                 gradient=dict(every=4)))


def learning(model, iterations, **cfg):
    """Which blocks learn, in each of these iterations."""
    hook, steps = LearningStepsHook(), []
    for iteration in iterations:
        hook.before_train_iter(SimpleNamespace(model=model, iter=iteration, cfg=cfg), 0)
        steps.append([layer.turn for layer in computing_layers(model).values()])
    return steps


def test_every_block_learns_once_in_k_iterations_and_all_iterations_cost_alike(model):
    steps = learning(model, range(4))
    assert [sum(turns) for turns in zip(*steps, strict=True)] == [1] * len(steps[0])
    assert max(map(sum, steps)) - min(map(sum, steps)) <= 1


def test_a_resumed_run_goes_on_with_the_iteration(model):
    assert learning(model, range(6, 12)) == learning(model, range(12))[6:]


def test_in_a_compiled_model_all_blocks_learn_in_the_same_iterations(model):
    steps = learning(model, range(5), compile=True)
    assert [set(turns) for turns in steps] == [{True}, {False}, {False}, {False}, {True}]
