"""Gradients: how it learns. Who gets gradient from a replaced block, and that its value is right."""
import copy

import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.replacement import materialize, replace_blocks_
from rl_mmdet.replacement.gradient import Gradient

BLOCKS = {'layer1': [1], 'layer2': [2, 3]}
"""One block with a tensor that only one neighbour has, and two replaced blocks side by side."""


@pytest.fixture
def make(toy_net, randomise_):
    """A replaced ToyNet in float64 with random weights, coefficients and statistics."""
    def build(mode: str, train: bool) -> nn.Module:
        net = toy_net().double()
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks=BLOCKS), gradient=dict(mode=mode)))
        return randomise_(net).train(train)
    return build


def loss_of(net: nn.Module, image: Tensor) -> Tensor:
    out = net(image)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return (out * weights).sum() + out.square().mean()


def gradients(net: nn.Module, image: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*((n, p) for n, p in net.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss_of(net, image), parameters), strict=True))


@torch.no_grad()
def finite_difference(net: nn.Module, parameter: nn.Parameter, direction: Tensor, image: Tensor) -> Tensor:
    """Central difference of the loss along ``direction``; buffers that train mode moves don't enter it."""
    losses, step, start = [], 1e-5, parameter.clone()
    for sign in (1, -1):
        parameter.copy_(start + sign * step * direction)
        losses.append(loss_of(net, image))
    parameter.copy_(start)
    return (losses[0] - losses[1]) / (2 * step)


def detached_difference(net: nn.Module, name: str, direction: Tensor, image: Tensor) -> Tensor:
    """The same of the materialized model, whose replaced blocks don't follow their neighbours."""
    plain = materialize(net)
    return finite_difference(plain, plain.get_parameter(name), direction, image)


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('mode', Gradient.MODES)
@pytest.mark.parametrize('layer', ['layer1.1', 'layer2.2', 'layer2.3'])
@pytest.mark.parametrize('side', [0, 1], ids=['a', 'b'])
def test_coefficient_gradient_equals_finite_difference(make, image, mode, train, layer, side):
    net, image = make(mode, train), image.double()
    coeff = net.get_parameter(f'{layer}.coeff')
    expected = finite_difference(net, coeff, torch.eye(2, dtype=torch.float64)[side], image)
    torch.testing.assert_close(gradients(net, image)[f'{layer}.coeff'][side], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('name', [
    'layer1.0.norm1.weight', 'layer1.0.conv2.weight', 'layer1.2.conv1.weight', 'layer1.2.conv2.bias',
    'layer2.1.conv1.weight', 'layer2.1.norm2.bias', 'layer2.4.conv2.weight', 'layer2.4.norm1.weight',
])
def test_coupled_neighbour_gradient_equals_finite_difference(make, image, train, name):
    net, image = make('coupled', train), image.double()
    direction = torch.randn_like(net.get_parameter(name))
    expected = finite_difference(net, net.get_parameter(name), direction, image)
    actual = (gradients(net, image)[name] * direction).sum()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', ['layer1.2.conv1.weight', 'layer2.1.conv1.weight', 'layer2.4.norm1.weight'])
def test_detached_neighbour_gradient_equals_difference_with_the_block_held(make, image, name):
    net, image = make('detached', False), image.double()
    direction = torch.randn_like(net.get_parameter(name))
    expected = detached_difference(net, name, direction, image)
    actual = (gradients(net, image)[name] * direction).sum()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_detached_kept_gradients_equal_those_with_constant_replaced_blocks(make, image, train):
    net, image = make('detached', train), image.double()
    constant = materialize(net)
    for stage, indices in BLOCKS.items():
        for index in indices:
            constant.get_submodule(f'{stage}.{index}').requires_grad_(False)
    expected = gradients(constant, image)
    actual = {name: value for name, value in gradients(net, image).items() if not name.endswith('coeff')}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_coupled_neighbour_gradient_is_the_chain_rule_over_materialized_gradients(make, image, train):
    net, image = make('coupled', train), image.double()
    plain = gradients(materialize(net), image)
    (a2, b2), (a3, b3) = net.layer2[2].coeff, net.layer2[3].coeff
    actual = gradients(net, image)
    for tensor in ('conv1.weight', 'norm1.weight', 'conv2.bias'):
        second, third = plain[f'layer2.2.{tensor}'], plain[f'layer2.3.{tensor}']
        for neighbour, through in (('layer2.1', a2 * second + a3 * third),
                                   ('layer2.4', b2 * second + b3 * third)):
            name = f'{neighbour}.{tensor}'
            torch.testing.assert_close(actual[name], plain[name] + through, rtol=1e-10, atol=1e-12)


def test_coefficient_gradient_is_that_of_the_weights_projected_on_the_neighbours(make, image):
    net, image = make('detached', False), image.double()
    plain = gradients(materialize(net), image)
    expected = torch.stack([sum((plain[f'layer2.2.{name}'] * tensor).sum() for name, tensor in
                                net.layer2[index].named_parameters()) for index in (1, 4)])
    torch.testing.assert_close(gradients(net, image)['layer2.2.coeff'], expected, rtol=1e-10, atol=1e-12)


def test_coefficient_gradient_is_equal_in_both_modes(make, image):
    image = image.double()
    detached, coupled = (gradients(make(mode, True), image) for mode in ('detached', 'coupled'))
    torch.testing.assert_close(detached['layer2.2.coeff'], coupled['layer2.2.coeff'], rtol=1e-12, atol=1e-14)


def test_neighbour_gradient_differs_between_the_modes(make, image):
    image = image.double()
    detached, coupled = (gradients(make(mode, True), image) for mode in ('detached', 'coupled'))
    assert not torch.allclose(detached['layer2.1.conv1.weight'], coupled['layer2.1.conv1.weight'], rtol=1e-3)


@pytest.mark.parametrize('mode', Gradient.MODES)
def test_input_gradient_equals_that_of_the_materialized_model(make, image, mode):
    net = make(mode, False)
    inputs = [image.double().requires_grad_() for _ in range(2)]
    for model, leaf in zip((net, materialize(net)), inputs, strict=True):
        loss_of(model, leaf).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('mode', Gradient.MODES)
def test_frozen_neighbours_still_give_the_coefficients_gradient(make, image, mode):
    net, image = make(mode, False), image.double()
    expected = gradients(net, image)['layer2.2.coeff']
    for index in (1, 4):
        net.layer2[index].requires_grad_(False)
    torch.testing.assert_close(gradients(net, image)['layer2.2.coeff'], expected, rtol=1e-12, atol=1e-14)


def test_gradient_accumulates_over_two_backwards(make, image):
    net, image = make('coupled', False), image.double()
    loss_of(net, image).backward()
    once = copy.deepcopy(net.layer2[2].coeff.grad)
    loss_of(net, image).backward()
    torch.testing.assert_close(net.layer2[2].coeff.grad, 2 * once)


def test_gradient_in_place_change_between_forward_and_backward_raises(make, image):
    net, image = make('coupled', False), image.double()
    loss = loss_of(net, image)
    with torch.no_grad():
        net.layer2[1].conv1.weight.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_gradient_default_mode_is_detached():
    assert Gradient().mode == 'detached'


def test_gradient_unknown_mode_names_the_allowed():
    with pytest.raises(ValueError, match="unknown mode 'frozen'; allowed: detached, coupled"):
        Gradient(mode='frozen')
