"""What the tests of sampled gradients share: a chain of blocks, its gradients, and these at every draw there is."""
import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

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
