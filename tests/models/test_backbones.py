"""Every backbone class and argument: without replacement the baseline bit for bit, materialized the baseline again."""
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.replacement import computing_layers, materialize


@dataclass(frozen=True)
class Built:
    """Of one setting: the baseline, ours unreplaced, ours replaced with random weights, and that one materialized."""
    baseline: nn.Module
    unreplaced: nn.Module
    model: nn.Module
    plain: nn.Module


@pytest.fixture(scope='module')
def built(setting, randomise_) -> Built:
    model = randomise_(setting.build())
    return Built(setting.build_baseline(), setting.build_unreplaced(), model, materialize(model))


def run(model: nn.Module, train: bool, image: Tensor) -> Any:
    """Outputs with the same random numbers (stochastic depth) at every call."""
    model.train(train)
    torch.manual_seed(5)
    with torch.no_grad():
        return model(image)


def shapes(model: nn.Module) -> dict[str, tuple]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def modules(model: nn.Module) -> list[tuple[str, type]]:
    """Names and classes, the outermost one's excepted."""
    return [(name, type(module)) for name, module in model.named_modules() if name]


def learns(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_no_replacement_is_the_baseline(built, image, assert_same_state):
    assert_same_state(built.unreplaced.state_dict(), built.baseline.state_dict())
    assert modules(built.unreplaced) == modules(built.baseline)
    assert built.unreplaced.replacement_report is None
    for train in (False, True):
        outs = [run(model, train, image) for model in (built.unreplaced, built.baseline)]
        assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))


def test_no_replacement_init_weights_is_the_baselines(case, assert_same_state):
    states = []
    for build in (case.build_unreplaced, case.build_baseline):
        model = build()
        model.init_weights()
        states.append(model.state_dict())
    assert_same_state(*states)


def test_replaced_model_holds_kept_tensors_buffers_and_a_pair_per_block(built, setting):
    replaced = built.model.replacement_report.replaced
    assert {chain: indices for chain, indices in replaced.items() if indices} == setting.replaced
    gone = tuple(f'{name}.' for name in computing_layers(built.model))
    assert len(gone) == sum(map(len, setting.replaced.values()))
    buffers = {name for name, _ in built.baseline.named_buffers()}
    expected = {key: shape for key, shape in shapes(built.baseline).items()
                if key in buffers or not key.startswith(gone)}
    assert shapes(built.model) == expected | {f'{name}coeff': (2,) for name in gone}


def test_materialized_model_is_the_baselines_with_the_replaced_ones_outputs(built, image, assert_near):
    assert shapes(built.plain) == shapes(built.baseline)
    assert modules(built.plain) == modules(built.baseline)
    assert learns(built.plain) == learns(built.baseline)
    for train in (False, True):
        assert_near(run(built.model, train, image), run(built.plain, train, image))


def test_output_shapes_of_an_odd_image_are_the_baselines(built, setting):
    image = torch.randn(1, 3, *setting.odd)
    outs = [run(model, False, image) for model in (built.model, built.baseline)]
    assert [out.shape for out in outs[0]] == [out.shape for out in outs[1]]


def test_backward_reaches_whatever_learns_in_the_baseline(built, image):
    reached = []
    for model in (built.model, built.baseline):
        model.train()
        model.zero_grad()
        sum(out.square().mean() for out in model(image)).backward()
        reached.append({name for name, p in model.named_parameters() if p.grad is not None})
    own = {name for name, _ in built.model.named_parameters()}
    coefficients = {f'{name}.coeff' for name in computing_layers(built.model)}
    assert reached[0] == reached[1] & own | coefficients
