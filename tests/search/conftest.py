"""What tests of searches share: small backbones of every kind, searched or with a choice of blocks replaced."""
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

import rl_mmdet  # noqa: F401  registers the RL backbones and the learned plans

LEARNED = dict(type='LearnedPlan', budget=dict(params=0.99))
TWO_STAGES = dict(base_channels=4, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1), norm_eval=False)
Step = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A small backbone whose blocks may be replaced.

    Args:
        cfg: its config, without ``replacement``.
        choice: blocks of it that can be replaced together, some of them side by side.
    """
    cfg: dict[str, Any]
    choice: dict[str, list[int]]

    def build(self, plan: dict[str, Any] | None = None, fusion: dict[str, Any] | None = None, operator: Any = None,
              gradient: dict[str, Any] | None = None, **more: Any) -> nn.Module:
        """The same weights at every call; without a plan the baseline."""
        torch.manual_seed(0)
        settings = dict(plan=plan, fusion=fusion, operator=operator, gradient=gradient or dict(every=1))
        return MODELS.build(copy.deepcopy(dict(self.cfg, replacement=plan and settings, **more)))

    def search(self, **more: Any) -> nn.Module:
        return self.build(LEARNED, **more)

    def replaced(self, **more: Any) -> nn.Module:
        return self.build(dict(type='Blocks', blocks=self.choice), **more)


CASES = {
    'bottleneck': Case(dict(type='RLResNet', depth=50, **TWO_STAGES), {'layer1': [1], 'layer2': [1, 2]}),
    'swin': Case(dict(type='RLSwin', embed_dims=8, depths=(2, 2, 4, 2), num_heads=(1, 2, 2, 4), window_size=4,
                      drop_path_rate=0.), {'stages.2.blocks': [1, 2]}),
    'vit': Case(dict(type='RLBackbone', timm='vit_tiny_patch16_224', embed_dim=24, num_heads=2, depth=5),
                {'blocks': [1, 2]}),
    'basic': Case(dict(type='RLResNet', depth=34, **TWO_STAGES), {'layer2': [1, 2]}),
    'convnext': Case(dict(type='RLBackbone', timm='convnext_atto', dims=(8, 16, 16, 32), depths=(2, 2, 4, 2)),
                     {'stages.2.blocks': [1, 2]}),
}


@pytest.fixture(params=[*list(CASES)[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[3:])])
def case(request) -> Case:
    """Every kind of block."""
    return CASES[request.param]


@pytest.fixture
def bottleneck() -> Case:
    return CASES['bottleneck']


@pytest.fixture
def picture() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def gates_of() -> Callable[[nn.Module, dict[str, list[int]]], list[bool]]:
    """A choice as the gates of a model that is being searched."""
    def gates(model: nn.Module, choice: dict[str, list[int]]) -> list[bool]:
        wanted = [index in choice.get(chain.name, ()) for chain, index in model.search_space.places]
        assert sum(wanted) == sum(map(len, choice.values()))
        return wanted
    return gates


@pytest.fixture
def as_replaced() -> Callable[[nn.Module, Step, dict[str, list[int]]], Step]:
    """Of a searched model's tensors, those of the model that replaces this choice, by its names."""
    def take(model: nn.Module, tensors: Step, choice: dict[str, list[int]]) -> Step:
        replaced = tuple(f'{place.name}.' for place in model.search_space.places
                         if place.index in choice.get(place.chain.name, ()))
        return {name.replace('.replaced.', '.'): value.clone() for name, value in tensors.items()
                if ('.replaced.' in name) == name.removeprefix('grad.').startswith(replaced)}
    return take


@pytest.fixture
def step(weighted) -> Callable[..., Step]:
    """Outputs of a model, and the gradients and buffers that one run forward and backward leaves."""
    def run(model: nn.Module, x: Tensor, way: Callable[..., Any] | None = None) -> Step:
        model.zero_grad()
        outs = (way or model)(x)
        outs = [outs] if isinstance(outs, Tensor) else outs
        weighted(outs).backward()
        return ({f'out.{number}': out.detach() for number, out in enumerate(outs)}
                | {f'grad.{name}': p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
                | {name: buffer.clone() for name, buffer in model.named_buffers()})
    return run


@pytest.fixture
def weighted() -> Callable[[Any], Tensor]:
    """A loss that every output counts in."""
    def loss(outs: Any) -> Tensor:
        outs = [outs] if isinstance(outs, Tensor) else outs
        return sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outs)
    return loss


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """The same names, and the same tensors: bit for bit, or up to a tolerance relative to each one's largest entry."""
    def check(actual: Step, expected: Step, tolerance: float = 0.) -> None:
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            close = tolerance * value.abs().max().item() + 1e-9 if tolerance and value.numel() else 0.
            torch.testing.assert_close(actual[name], value, rtol=0., atol=close, msg=name, equal_nan=True)
    return check
