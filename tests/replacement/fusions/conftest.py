"""What tests of fusions share: the tensors of two neighbours, and parameters to start from."""
from collections.abc import Callable

import pytest
import torch

from rl_mmdet.replacement.fusions import Fusion, Pair

SHAPES = {'conv.weight': (4, 3, 3, 3), 'norm.weight': (4,), 'fc.weight': (6, 4), 'fc.bias': (6,), 'table': (9, 2)}
"""Of a small block with every kind of tensor."""


@pytest.fixture
def shapes() -> dict:
    return dict(SHAPES)


@pytest.fixture
def pairs_of() -> Callable[..., dict[str, Pair]]:
    """Neighbours' tensors in float64; the fully connected layer has only one before, its bias only one after it."""
    def build(shapes: dict = SHAPES, one_sided: bool = True) -> dict[str, Pair]:
        generator = torch.Generator().manual_seed(0)
        made = {name: tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
                for name, shape in shapes.items()}
        if one_sided:
            made['fc.weight'] = (made['fc.weight'][0], None)
            made['fc.bias'] = (None, made['fc.bias'][1])
        return made
    return build


@pytest.fixture
def start_of() -> Callable[..., dict[str, torch.Tensor]]:
    """The parameters that a fusion starts from, in float64."""
    def build(fusion: Fusion, shapes: dict = SHAPES) -> dict[str, torch.Tensor]:
        return fusion.start(shapes)
    return build


@pytest.fixture
def mixed() -> Callable[..., dict[str, torch.Tensor]]:
    """a·before + b·after with one (a, b) for each tensor, a missing side counting as nothing."""
    def mix(coeff: list[list[float]], pairs: dict[str, Pair]) -> dict[str, torch.Tensor]:
        return {name: sum(factor * side for factor, side in zip(each, pair, strict=True) if side is not None)
                for each, (name, pair) in zip(coeff, pairs.items(), strict=True)}
    return mix
