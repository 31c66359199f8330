"""Every backbone class and argument: without replacement the baseline bit for bit, materialized the baseline again."""
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.replacement import computing_layers, materialize


@dataclass(frozen=True)
class Built:
    """Of one setting: replaced with random weights and statistics, materialized, unreplaced, and the baseline.

    ``outputs`` and ``plain_outputs`` are the first two's in eval (False) and in train mode (True).
    """
    model: nn.Module
    plain: nn.Module
    unreplaced: nn.Module
    baseline: nn.Module
    outputs: dict[bool, Any]
    plain_outputs: dict[bool, Any]


@pytest.fixture(scope='module')
def built(setting, randomise_) -> Built:
    model = randomise_(setting.build())
    plain = materialize(model)
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    outputs = [{train: run(each, train, image) for train in (False, True)} for each in (model, plain)]
    return Built(model, plain, setting.build_unreplaced(), setting.build_baseline(), *outputs)


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


# Without replacement

def test_no_replacement_state_dict_is_the_baselines(built, assert_same_state):
    assert_same_state(built.unreplaced.state_dict(), built.baseline.state_dict())


def test_no_replacement_init_weights_is_the_baselines(case, assert_same_state):
    states = []
    for build in (case.build_unreplaced, case.build_baseline):
        model = build()
        model.init_weights()
        states.append(model.state_dict())
    assert_same_state(*states)


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_no_replacement_outputs_are_the_baselines(built, image, train):
    outs = [run(model, train, image) for model in (built.unreplaced, built.baseline)]
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))


def test_no_replacement_modules_are_the_baselines(built):
    assert modules(built.unreplaced) == modules(built.baseline)


def test_no_replacement_there_is_no_report(built):
    assert built.unreplaced.replacement_report is None


# What a replaced backbone holds

def test_replaced_blocks_are_every_second_that_can_be(built, setting):
    replaced = built.model.replacement_report.replaced
    assert {chain: indices for chain, indices in replaced.items() if indices} == setting.replaced


def test_state_dict_is_kept_tensors_buffers_and_a_pair_per_block(built):
    gone = tuple(f'{name}.' for name in computing_layers(built.model))
    buffers = {name for name, _ in built.baseline.named_buffers()}
    expected = {key: shape for key, shape in shapes(built.baseline).items()
                if key in buffers or not key.startswith(gone)}
    assert shapes(built.model) == expected | {f'{name}coeff': (2,) for name in gone}


def test_parameters_are_two_per_replaced_block_and_the_kept_blocks(built):
    removed = [built.baseline.get_submodule(name) for name in computing_layers(built.model)]
    model, baseline, gone = (sum(p.numel() for p in nn.ModuleList(parts).parameters())
                             for parts in ([built.model], [built.baseline], removed))
    assert model == baseline - gone + 2 * len(removed)


def test_materialize_keys_and_shapes_are_the_baselines(built):
    assert shapes(built.plain) == shapes(built.baseline)


def test_materialize_modules_are_the_baselines(built):
    assert modules(built.plain) == modules(built.baseline)


def test_materialize_keeps_who_learns(built):
    plain, baseline = ({name: p.requires_grad for name, p in model.named_parameters()}
                       for model in (built.plain, built.baseline))
    assert plain == baseline


# What it computes

@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_materialize_outputs_equal(built, assert_near, train):
    assert_near(built.outputs[train], built.plain_outputs[train])


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
