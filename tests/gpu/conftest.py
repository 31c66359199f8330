"""What the tests on a GPU share. With ``RL_MMDET_TEST_DEVICE=cpu`` they run on the CPU, as a rehearsal."""
import copy
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

import rl_mmdet  # noqa: F401  registers the RL backbones

SECONDS = 90
"""Longest time that a test may take before it fails and the next one begins."""
EVERY_SECOND = dict(type='EveryKth', k=2)
BACKBONES = {
    'r50': dict(type='RLResNet', depth=50, base_channels=8),
    'swin': dict(type='RLSwin', embed_dims=16, depths=(2, 2, 6, 2), num_heads=(1, 2, 2, 4), window_size=4,
                 drop_path_rate=0.),
    'vit': dict(type='RLViT', arch=dict(embed_dim=48, num_heads=3, depth=6), img_size=64, window_size=2),
    'mobilenetv2': dict(type='RLBackbone', backbone=dict(type='MobileNetV2', widen_factor=0.25)),
}
"""Narrow ones of every kind of block."""
Step = dict[str, Tensor]


@pytest.fixture(scope='session')
def device() -> torch.device:
    """Where the tests run."""
    return torch.device(os.environ.get('RL_MMDET_TEST_DEVICE', 'cuda'))


@pytest.fixture(autouse=True)
def without_tf32() -> Iterator[None]:
    """Single precision is single precision."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A test that hangs fails."""
    def stop(*_: Any) -> None:
        raise TimeoutError(f'the test takes more than {SECONDS} seconds')

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def build(randomise_) -> Callable[..., nn.Module]:
    """Build a backbone on the CPU in training mode, with random weights; the same ones at every call."""
    def make(name: str, plan: Mapping[str, Any] | None = EVERY_SECOND, fusion: Mapping[str, Any] | None = None,
             operator: Mapping[str, Any] | None = None, gradient: Mapping[str, Any] | None = None,
             **more: Any) -> nn.Module:
        torch.manual_seed(0)
        replacement = plan and dict(plan=plan, fusion=fusion, operator=operator, gradient=gradient)
        model = MODELS.build(copy.deepcopy(dict(BACKBONES[name], replacement=replacement, **more)))
        randomise_(model)
        model.train()  # mmdet's backbones return None here
        return model
    return make


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def step() -> Callable[..., Step]:
    """Outputs of a model, the gradients of its input and parameters, and its buffers after one training step.

    All come back on the CPU, in double precision.
    """
    def run(model: nn.Module, x: Tensor, scale: float = 1., forward: Callable[[Tensor], Any] | None = None) -> Step:
        model.zero_grad()
        x = x.detach().clone().requires_grad_()
        outs = (model if forward is None else forward)(x)
        outs = [outs] if isinstance(outs, Tensor) else list(outs)
        losses = [(out.float() if out.dtype.itemsize < 4 else out).mul(_weights(out)).mean() for out in outs]
        (scale * sum(losses)).backward()
        found = {f'out.{number}': out.detach() for number, out in enumerate(outs)} | {'grad.input': x.grad}
        found |= {f'grad.{name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
        found |= dict(model.named_buffers())
        return {name: value.to('cpu', torch.float64, copy=True) for name, value in found.items()}
    return run


def _weights(out: Tensor) -> Tensor:
    """What the numbers of an output count in the loss."""
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.device, torch.promote_types(
        out.dtype, torch.float32))


@pytest.fixture
def assert_same() -> Callable[[Step, Step, float], None]:
    """The same names, and tensors of the same values up to ``tolerance``, relative to the tensor's norm."""
    def check(actual: Step, expected: Step, tolerance: float = 1e-9) -> None:
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.isfinite(value).all(), name
            difference = (actual[name] - value).norm().item()
            assert difference <= tolerance * value.norm().item() + 1e-12, f'{name}: {difference}, {value.norm()}'
    return check


@pytest.fixture
def distance() -> Callable[[Step, Step], float]:
    """How far all gradients together are from the expected ones, relative to these.

    A ReLU that rounding opens or closes changes single tensors by per cents, and all together by next to nothing.
    """
    def measure(found: Step, expected: Step) -> float:
        assert found.keys() == expected.keys()
        names = [name for name in expected if name.startswith('grad.')]
        error, size = (math.sqrt(sum(tensors[name].square().sum().item() for name in names)) for tensors in (
            {name: found[name] - expected[name] for name in names}, expected))
        return error / size
    return measure


@pytest.fixture
def assert_near(distance, assert_same) -> Callable[[Step, Step], None]:
    """Two steps in single precision are equal but for rounding."""
    def check(actual: Step, expected: Step) -> None:
        assert distance(actual, expected) < 1e-2
        assert_same(*({name: value for name, value in each.items() if not name.startswith('grad.')}
                      for each in (actual, expected)), 1e-3)
    return check
