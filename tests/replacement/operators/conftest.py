"""What tests of operators share: three blocks in a row, the middle one replaced."""
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.replacement import replace_blocks_
from rl_mmdet.replacement.saved_bytes import saved_bytes


class Net(nn.Module):
    """Three equal blocks in a row; what else a block is given comes with the call."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(3))

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *args)
        return x


@pytest.fixture
def build(randomise_) -> Callable[..., Net]:
    """Three blocks with random weights in eval mode, the middle one replaced unless ``operator`` is None."""
    def net_of(make: Callable[[], nn.Module], operator: dict | None, fusion: Any = None, mode: str = 'detached') -> Net:
        torch.manual_seed(0)
        net = Net(make)
        if operator is not None:
            replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'blocks': [1]}), fusion=fusion,
                                      operator=operator, gradient=dict(mode=mode, every=1)))
        values = {n: p.detach().clone() for n, p in net.named_parameters() if n.endswith('scale')}
        randomise_(net).eval()
        for slot, value in values.items():  # a known γ, not the same for all channels
            net.get_parameter(slot).data.copy_(value * torch.linspace(0.5, 1.5, len(value)))
        return net
    return net_of


@pytest.fixture
def fused() -> Callable[[Net, str], Tensor]:
    """a·θ_p + b·θ_n, from the kept blocks themselves."""
    def take(net: Net, tensor: str) -> Tensor:
        a, b = net.blocks[1].coeff.detach()
        return a * net.blocks[0].get_parameter(tensor).detach() + b * net.blocks[2].get_parameter(tensor).detach()
    return take


@pytest.fixture
def unit() -> Callable[[Tensor], Tensor]:
    """Each output channel's part brought to length 1."""
    return lambda kernel: torch.stack([part / part.square().sum().sqrt() for part in kernel])


@pytest.fixture
def saved_per_position() -> Callable[..., float]:
    """What twice as many positions save more: float32 numbers, the input included, weights excluded."""
    def count(layer: nn.Module, *shape: int) -> float:
        counts = []
        for batch in (1, 2):
            x = torch.randn(batch, *shape, requires_grad=True)
            counts.append(saved_bytes(layer, lambda x=x: layer(x)))
        positions = shape[-1] * shape[-2] if len(shape) == 3 else shape[0]
        return (counts[1] - counts[0]) / 4 / positions
    return count
