"""Fusions: with what; the learnable map from the two neighbours' tensors to the tensor that is used."""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .registry import FUSIONS

Pair = tuple[Tensor | None, Tensor | None]
"""A tensor of the neighbour before and of the one after; None where the shapes don't agree."""


@dataclass(frozen=True)
class Fit:
    """What a fusion's parameters should start from, given the weights of the removed block.

    Args:
        parameters: value of each of the fusion's parameters.
        residual: :math:`\\lVert θ_i - θ̂_i \\rVert / \\lVert θ_i \\rVert` over all tensors of the block, no unit;
            0 is a perfect reconstruction, 1 is what zero weights would give.
    """
    parameters: dict[str, Tensor]
    residual: float


@FUSIONS.register_module()
class ScalarFusion:
    r"""RL-v1: one pair of learnable scalars per replaced block.

    .. math:: θ_i = a·θ_p + b·θ_n

    for every parameter tensor of the block, with :math:`θ_p, θ_n` those of the nearest kept blocks before and
    after it. A tensor whose shape agrees with only one neighbour is that one's, times its scalar.

    The computing layer gets one parameter, ``coeff`` of shape ``(2,)``, holding :math:`(a, b)`.

    Args:
        init: start of both scalars without pretrained weights.
        pretrained: start when the removed block's weights are known: ``'average'`` (both are ``init``) or
            ``'least_squares'`` (the :math:`(a, b)` that reconstructs them best). docs/pretrained.md has the
            measurement behind the default.

    Raises:
        ValueError: ``init`` isn't a finite number, or ``pretrained`` is unknown.

    Source: "Replacement Learning: Training Vision Tasks with Fewer Learnable Parameters", arXiv 2410.01239.
    """
    PRETRAINED = ('average', 'least_squares')

    def __init__(self, init: float = 0.5, pretrained: str = 'average') -> None:
        if isinstance(init, bool) or not isinstance(init, (int, float)) or not math.isfinite(init):
            raise ValueError(f'ScalarFusion: init must be a finite number, got {init!r}')
        if pretrained not in self.PRETRAINED:
            raise ValueError(f'ScalarFusion: unknown pretrained={pretrained!r}; '
                             f'allowed: {", ".join(self.PRETRAINED)}')
        self.init = float(init)
        self.pretrained = pretrained

    def new_parameters(self, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        """The learnable parameters of one replaced block."""
        return {'coeff': nn.Parameter(torch.full((2,), self.init, device=device, dtype=dtype))}

    def fuse(self, parameters: dict[str, Tensor], pairs: dict[str, Pair]) -> dict[str, Tensor]:
        """Synthesise the block's tensors, each of the shape its sources have."""
        a, b = parameters['coeff'].unbind()
        return {name: _mix(a, b, pair) for name, pair in pairs.items()}

    @torch.no_grad()
    def fit(self, targets: dict[str, Tensor], pairs: dict[str, Pair]) -> Fit:
        """Choose the start of (a, b) from the removed block's own weights ``targets``."""
        like = next(iter(targets.values()))
        coeff = torch.full((2,), self.init, dtype=torch.float64, device=like.device)
        if self.pretrained == 'least_squares':
            coeff = _least_squares(targets, pairs)
        made = self.fuse({'coeff': coeff}, {n: _double(pair) for n, pair in pairs.items()})
        error = sum((targets[n].double() - made[n]).square().sum() for n in pairs)
        size = sum(targets[n].double().square().sum() for n in pairs)
        residual = (error / size).sqrt().item() if size > 0 else 0.0
        return Fit({'coeff': coeff.to(like.dtype)}, residual)

    def __repr__(self) -> str:
        return f'ScalarFusion(init={self.init}, pretrained={self.pretrained!r})'


def _mix(a: Tensor, b: Tensor, pair: Pair) -> Tensor:
    before, after = pair
    if before is None:
        return b * after
    if after is None:
        return a * before
    return a * before + b * after


def _double(pair: Pair) -> Pair:
    return tuple(None if tensor is None else tensor.double() for tensor in pair)


def _least_squares(targets: dict[str, Tensor], pairs: dict[str, Pair]) -> Tensor:
    r"""Minimise :math:`\sum_θ \lVert θ_i - aθ_p - bθ_n \rVert^2` through its 2×2 normal equations."""
    like = next(iter(targets.values()))
    gram = torch.zeros(2, 2, dtype=torch.float64, device=like.device)
    right = torch.zeros(2, dtype=torch.float64, device=like.device)
    for name, pair in pairs.items():
        target, sides = targets[name].double(), _double(pair)
        for i, left_side in enumerate(sides):
            if left_side is None:
                continue
            right[i] += (left_side * target).sum()
            for j, right_side in enumerate(sides):
                if right_side is not None:
                    gram[i, j] += (left_side * right_side).sum()
    return torch.linalg.pinv(gram, hermitian=True) @ right
