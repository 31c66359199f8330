"""What tests here share: chains of blocks and their gradients at every draw there is, and models that are searched."""
import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

import rl_mmdet  # noqa: F401  registers the RL backbones and the learned plans
from rl_mmdet.replacement import computing_layers, replace_blocks_

Gradients = dict[str, Tensor]


@pytest.fixture
def chain(randomise_) -> Callable[..., nn.Module]:
    """Build a chain ``'0'`` of equal blocks in float64, some of them replaced; the same random one at every call."""
    def build(make: Callable[[], nn.Module], replaced: Iterable[int] = (1,), *, fusion: str = 'ScalarFusion',
              operator: dict | None = None, train: bool = False, **gradient) -> nn.Module:
        torch.manual_seed(0)
        replaced = list(replaced)
        model = nn.Sequential(nn.Sequential(*(make() for _ in range(len(replaced) + 2))))
        randomise_(model)
        replace_blocks_(model, dict(plan=dict(type='Blocks', blocks={'0': replaced}), fusion=dict(type=fusion),
                                    operator=operator, gradient=gradient))
        for layer in computing_layers(model).values():
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, 0.3, 0.7)
        return model.double().train(train)
    return build


@pytest.fixture
def gradients() -> Callable[[nn.Module, Tensor], Gradients]:
    """Output and gradients of a model: of its input and of all parameters that get one."""
    def take(model: nn.Module, x: Tensor) -> Gradients:
        model.zero_grad()
        x = x.clone().requires_grad_()
        outs = model(x)
        out = torch.cat([out.flatten() for out in ([outs] if isinstance(outs, Tensor) else outs)])
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype)).sum().backward()
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


@pytest.fixture
def at_every_draw(gradients, monkeypatch) -> Callable[[nn.Module, Tensor], list[Gradients]]:
    """The gradients at every combination of parts that can be drawn, in place of a random one."""
    def enumerate_draws(model: nn.Module, x: Tensor) -> list[Gradients]:
        counts, found = [], []
        with monkeypatch.context() as patch:
            patch.setattr(torch, 'randint', lambda count, size: counts.append(count) or torch.tensor(0))
            gradients(model, x)
            for choice in itertools.product(*map(range, list(counts))):
                queue = list(choice)
                patch.setattr(torch, 'randint', lambda count, size, queue=queue: torch.tensor(queue.pop(0)))
                found.append(gradients(model, x))
                assert not queue
        return found
    return enumerate_draws


@pytest.fixture
def mean() -> Callable[[list[Gradients]], Gradients]:
    def take(found: list[Gradients]) -> Gradients:
        return {name: torch.stack([each[name] for each in found]).mean(0) for name in found[0]}
    return take


@dataclass(frozen=True)
class Searched:
    """A small backbone of which it is open which blocks are replaced.

    Args:
        cfg: its config, without ``replacement``.
        choice: blocks of it that can be replaced together, some of them side by side.
    """
    cfg: dict[str, Any]
    choice: dict[str, list[int]]

    def build(self, plan: dict[str, Any] | None = None, fusion: dict[str, Any] | None = None,
              gradient: dict[str, Any] | None = None, **more: Any) -> nn.Module:
        """The same weights at every call; without a plan the baseline."""
        torch.manual_seed(0)
        replacement = None if plan is None else dict(plan=plan, fusion=fusion, gradient=gradient)
        return MODELS.build(copy.deepcopy(dict(self.cfg, replacement=replacement, **more)))

    def search(self, **more: Any) -> nn.Module:
        return self.build(LEARNED, **more)

    def replaced(self, **more: Any) -> nn.Module:
        return self.build(dict(type='Blocks', blocks=self.choice), **more)


LEARNED = dict(type='LearnedPlan', budget=dict(params=0.99))
TWO_STAGES = dict(base_channels=4, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1), norm_eval=False)
VIT = dict(embed_dim=24, num_heads=2, depth=5)
SEARCHED = {
    'bottleneck': Searched(dict(type='RLResNet', depth=50, **TWO_STAGES), {'layer1': [1], 'layer2': [1, 2]}),
    'basic': Searched(dict(type='RLResNet', depth=34, **TWO_STAGES), {'layer2': [1, 2]}),
    'swin': Searched(dict(type='RLSwin', embed_dims=8, depths=(2, 2, 4, 2), num_heads=(1, 2, 2, 4), window_size=4,
                          drop_path_rate=0.), {'stages.2.blocks': [1, 2]}),
    'vit': Searched(dict(type='RLBackbone', timm='vit_tiny_patch16_224', **VIT), {'blocks': [1, 2]}),
    'convnext': Searched(dict(type='RLBackbone', timm='convnext_atto', dims=(8, 16, 16, 32), depths=(2, 2, 4, 2)),
                         {'stages.2.blocks': [1, 2]}),
}


@pytest.fixture(params=SEARCHED.values(), ids=SEARCHED)
def searched(request) -> Searched:
    """Every kind of block."""
    return request.param


@pytest.fixture
def search_case() -> Callable[[str], Searched]:
    """One of them, by name."""
    return SEARCHED.__getitem__


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
def as_replaced() -> Callable[[nn.Module, dict[str, Tensor], dict[str, list[int]]], dict[str, Tensor]]:
    """Of a searched model's tensors, those of the model that replaces this choice, by its names."""
    def take(model: nn.Module, tensors: dict[str, Tensor], choice: dict[str, list[int]]) -> dict[str, Tensor]:
        replaced = tuple(f'{place.name}.' for place in model.search_space.places
                         if place.index in choice.get(place.chain.name, ()))
        return {name.replace('.replaced.', '.'): value.clone() for name, value in tensors.items()
                if ('.replaced.' in name) == name.removeprefix('grad.').startswith(replaced)}
    return take


@pytest.fixture
def step() -> Callable[..., Gradients]:
    """Outputs of a model, and the gradients and buffers that one run forward and backward leaves."""
    def run(model: nn.Module, x: Tensor, way: Callable[..., Any] | None = None) -> Gradients:
        model.zero_grad()
        outs = (way or model)(x)
        outs = [outs] if isinstance(outs, Tensor) else outs
        if outs[0].requires_grad:
            sum((out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outs).backward()
        return ({f'out.{number}': out.detach() for number, out in enumerate(outs)}
                | {f'grad.{name}': p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
                | {name: buffer.clone() for name, buffer in model.named_buffers()})
    return run


@pytest.fixture
def assert_equal() -> Callable[[Gradients, Gradients], None]:
    """The same names and, bit for bit, the same tensors."""
    def check(actual: Gradients, expected: Gradients) -> None:
        assert actual.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []
    return check
