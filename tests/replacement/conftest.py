"""What tests here share: a small replaced model, and the gradients of a model."""
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.replacement import replace_blocks_

BLOCKS = {'layer1': [1], 'layer2': [2, 3]}
"""Of a ToyNet: one block with a tensor that only one neighbour has, and two replaced blocks side by side."""
Gradients = dict[str, Tensor]


@pytest.fixture
def replaced(toy_net, randomise_) -> Callable[..., nn.Module]:
    """A ToyNet with replaced blocks and random weights, coefficients and statistics; the same one at every call."""
    def build(blocks: dict[str, list[int]] = BLOCKS, **settings) -> nn.Module:
        net = toy_net()
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks=blocks), **settings))
        return randomise_(net)
    return build


@pytest.fixture
def gradients() -> Callable[[nn.Module, Tensor], Gradients]:
    """Output and gradients of a model: of its input and of all parameters that get one."""
    def take(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None, scale: float = 1) -> Gradients:
        model.zero_grad()
        x = x.detach().clone().requires_grad_()
        out = model(x) if run is None else run(x)
        (scale * out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        return {'out': out.detach(), 'input': x.grad} | {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return take


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """The same names, and tensors of the same values up to ``tolerance``, relative to the tensor's norm."""
    def check(actual: Gradients, expected: Gradients, tolerance: float = 1e-10) -> None:
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert (actual[name].double() - value.double()).norm() <= tolerance * value.double().norm() + 1e-12, name
    return check
