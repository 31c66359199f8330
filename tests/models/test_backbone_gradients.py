"""Every backbone class in training: gradients by the chain rule, modes and frozen stages, checkpointing, autocast."""
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.replacement import ComputingLayer, computing_layers, materialize
from rl_mmdet.replacement.gradient import Gradient

Gradients = dict[str, Tensor]


def backward(model: nn.Module, image: Tensor) -> Gradients:
    """Gradients of all parameters and, as ``image``, of the image; stochastic depth is the same at every call."""
    model.train()
    image = image.clone().requires_grad_()
    torch.manual_seed(5)
    with torch.enable_grad():
        sum(out.square().mean() for out in model(image)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {'image': image.grad}


def assert_same_gradients(actual: Gradients, expected: Gradients, tolerance: float = 1e-7) -> None:
    """Equal up to rounding; biases in front of a norm have gradients that are nothing but rounding."""
    assert actual.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm() + 1e-12 * largest, name


@dataclass(frozen=True)
class Backward:
    """A replaced backbone in float64 after one training step, its gradients, the materialized one and those of it."""
    model: nn.Module
    gradients: Gradients
    materialized: nn.Module
    plain: Gradients

    def contributions(self, name: str, layer: ComputingLayer, side: int) -> list[tuple[str, Tensor]]:
        """For every tensor of a removed block: the kept tensor on one side of it, and the gradient of its own."""
        names = {module: path for path, module in self.model.named_modules()}
        return [(f'{names[layer.kept[sides[side]]]}.{tensor}', self.plain[f'{name}.{tensor}'])
                for tensor, sides in layer.sources.items() if sides[side] is not None]


@pytest.fixture(scope='module', params=Gradient.MODES)
def trained(request, case, randomise_) -> Backward:
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)).double()
    model = randomise_(case.build(request.param)).double()
    plain = materialize(model).requires_grad_(True)
    return Backward(model, backward(model, image), plain, backward(plain, image))


def test_coefficient_gradients_are_contractions_of_the_materialized_blocks(trained):
    """For both modes: dL/da is the sum of <dL/dθ_i, θ_p> over the block's tensors, dL/db that with θ_n."""
    for name, layer in computing_layers(trained.model).items():
        for side in (0, 1):
            terms = [(gradient * trained.model.get_parameter(kept)).sum()
                     for kept, gradient in trained.contributions(name, layer, side)]
            size = sum(term.abs() for term in terms)
            assert size > 0
            assert (layer.coeff.grad[side] - sum(terms)).abs() <= 1e-8 * size, f'{name} {side}'


def test_kept_gradients_are_the_chain_rules(trained):
    """Detached: of their own place alone; coupled: and a·dL/dθ_i, b·dL/dθ_i of every block that they make."""
    layers = computing_layers(trained.model)
    expected = {name: trained.plain[name].clone() for name in trained.gradients if not name.endswith('.coeff')}
    for name, layer in layers.items():
        for side in (0, 1) if layer.gradient.mode == 'coupled' else ():
            for kept, gradient in trained.contributions(name, layer, side):
                expected[kept] += layer.coeff[side].detach() * gradient
    actual = {name: value for name, value in trained.gradients.items() if not name.endswith('.coeff')}
    assert_same_gradients(actual, expected)


def test_train_statistics_move_as_those_of_the_materialized_model(trained):
    for name, buffer in trained.materialized.named_buffers():
        torch.testing.assert_close(trained.model.get_buffer(name), buffer, rtol=1e-9, atol=1e-9, msg=name)


# Modes and frozen stages

def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.fixture(scope='module')
def twins(case) -> tuple[nn.Module, nn.Module]:
    """Ours and the baseline."""
    return case.build(), case.build_baseline()


@pytest.fixture(scope='module')
def frozen(freezing, in_mode) -> tuple[nn.Module, nn.Module]:
    """Ours and the baseline, with stages and norms frozen, which some of mmdet's classes do in ``train()``."""
    return tuple(in_mode(build(**freezing.frozen), True) for build in (freezing.build, freezing.build_baseline))


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_modes_are_the_baselines(twins, in_mode, train):
    model, baseline = (in_mode(in_mode(each, not train), train) for each in twins)
    assert modes(model) == modes(baseline)


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_modes_with_frozen_norms_are_the_baselines(frozen, in_mode, train):
    model, baseline = (in_mode(in_mode(each, not train), train) for each in frozen)
    assert modes(model) == modes(baseline)


def test_frozen_parameters_are_the_baselines(frozen):
    model, baseline = frozen
    gone = tuple(f'{name}.' for name in computing_layers(model))
    expected = {name: p.requires_grad for name, p in baseline.named_parameters() if not name.startswith(gone)}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == expected | {
        f'{name}coeff': True for name in gone}


def test_frozen_stages_are_left_alone(frozen):
    model, baseline = frozen
    for name in computing_layers(model):
        stage = baseline.get_submodule(name.rpartition('.')[0])
        assert any(p.requires_grad for p in stage.parameters()), name


# Checkpointing and autocast

def test_with_cp_gradients_equal(checkpointing, randomise_, image):
    models = [randomise_(checkpointing.build('coupled', with_cp=with_cp)).double() for with_cp in (False, True)]
    plain, again = (backward(model, image.double()) for model in models)
    assert_same_gradients(again, plain)


def test_autocast_equals_the_materialized_model(case, randomise_, in_mode, image, assert_near):
    model = in_mode(randomise_(case.build()), False)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        assert_near(model(image), materialize(model)(image), 1e-2)


def test_autocast_gradients_are_finite_and_float32(case, image):
    model = case.build('coupled')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        model.train()
        loss = sum(out.float().square().mean() for out in model(image))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == torch.float32, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
