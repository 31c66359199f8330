"""Every backbone class in training: exact gradients, modes and frozen stages, checkpointing, autocast."""
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.replacement import computing_layers, materialize

Gradients = dict[str, Tensor]


def loss(model: nn.Module, image: Tensor) -> Tensor:
    """In train mode, with the same stochastic depth at every call."""
    model.train()
    torch.manual_seed(5)
    return sum(out.to(torch.promote_types(out.dtype, torch.float32)).square().mean() for out in model(image))


def backward(model: nn.Module, image: Tensor) -> Gradients:
    """Gradients of all parameters and, as ``image``, of the image."""
    image = image.clone().requires_grad_()
    loss(model, image).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {'image': image.grad}


def assert_same_gradients(actual: Gradients, expected: Gradients, tolerance: float = 1e-7) -> None:
    """Equal up to rounding; biases in front of a norm have gradients that are nothing but rounding."""
    assert actual.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm() + 1e-12 * largest, name


@torch.no_grad()
def assert_slope(model: nn.Module, image: Tensor, gradients: Gradients, names: Iterable[str]) -> None:
    """The gradients say how the loss changes when the parameters ``names`` move together in a random direction."""
    parameters = dict(model.named_parameters())
    moves = {name: torch.randn_like(parameters[name]) for name in sorted(names)}
    terms = torch.stack([(gradients[name] * move).sum() for name, move in moves.items()])
    losses = []
    for step in (1e-8, -2e-8):
        for name, move in moves.items():
            parameters[name] += step * move
        losses.append(loss(model, image))
    assert abs((losses[0] - losses[1]) / 2e-8 - terms.sum()) <= 1e-3 * terms.norm()


@pytest.fixture
def double_image(image) -> Tensor:
    return image.double()


def test_detached_gradients(case, randomise_, double_image):
    """Kept blocks learn as in the materialized model, from their own places alone; the coefficients as they should."""
    model = randomise_(case.build('detached')).double()
    plain = materialize(model).requires_grad_(True)
    expected, gradients = backward(plain, double_image), backward(model, double_image)
    coefficients = [name for name in gradients if name.endswith('.coeff')]
    assert len(coefficients) == len(computing_layers(model))
    kept = gradients.keys() - set(coefficients)
    assert_same_gradients({name: gradients[name] for name in kept}, {name: expected[name] for name in kept})
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-9, atol=1e-9, msg=name)
    assert_slope(model, double_image, gradients, coefficients)


def test_coupled_gradients(case, randomise_, double_image):
    """All parameters learn from every block that they make."""
    model = randomise_(case.build('coupled')).double()
    gradients = backward(model, double_image)
    assert_slope(model, double_image, gradients, gradients.keys() - {'image'})


# Modes and frozen stages

def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_modes_are_the_baselines(case, in_mode):
    model, baseline = case.build(), case.build_baseline()
    for train in (False, True):
        assert modes(in_mode(model, train)) == modes(in_mode(baseline, train))


def test_frozen_stages_and_norms_are_the_baselines(freezing, in_mode):
    model, baseline = (in_mode(build(**freezing.frozen), False) for build in (freezing.build, freezing.build_baseline))
    assert modes(in_mode(model, True)) == modes(in_mode(baseline, True))  # some of mmdet's classes freeze in train()
    gone = tuple(f'{name}.' for name in computing_layers(model))
    expected = {name: p.requires_grad for name, p in baseline.named_parameters() if not name.startswith(gone)}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == expected | {
        f'{name}coeff': True for name in gone}
    for name in gone:
        stage = baseline.get_submodule(name[:-1].rpartition('.')[0])
        assert any(p.requires_grad for p in stage.parameters()), f'{name} is in a frozen stage'


# Checkpointing and autocast

def test_with_cp_gradients_equal(checkpointing, randomise_, double_image):
    models = [randomise_(checkpointing.build('coupled', with_cp=with_cp)).double() for with_cp in (False, True)]
    plain, again = (backward(model, double_image) for model in models)
    assert_same_gradients(again, plain)


def test_autocast_equals_the_materialized_model(case, randomise_, in_mode, image, assert_near):
    model = in_mode(randomise_(case.build()), False)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        assert_near(model(image), materialize(model)(image), 1e-2)


def test_autocast_gradients_are_finite_and_float32(case, image):
    model = case.build('coupled')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = loss(model, image)
    found.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == torch.float32, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
