"""What users would otherwise do with the blocks of a plan: references to measure Replacement Learning against.

Two more need no code of their own: ``operator=dict(type='Skip')`` leaves the blocks out, and
``fusion=dict(type='OwnWeights', learn=False)`` keeps them with fixed weights.
"""
from typing import Any

import torch
from torch import Tensor, nn

from .block_parts import keeps_its_shape, mlp, other_ways_forward
from .fusions import Fit, Fusion, Pair, residual
from .operators import Operator
from .registry import FUSIONS, OPERATORS
from .resize import Shape


@FUSIONS.register_module()
class SharedWeights(Fusion):
    r"""A neighbour's tensors as they are: :math:`θ_i = θ_p`, RL-v1 with :math:`a = 1, b = 0` fixed. It learns nothing.

    With ``gradient=dict(mode='coupled')`` it is ordinary weight sharing: the neighbour learns from both places.

    Args:
        side: ``'before'`` or ``'after'``: which neighbour. A tensor that it doesn't have comes from the other one.
        adapt: see :class:`~rl_mmdet.replacement.fusions.Fusion`.

    Raises:
        ValueError: another ``side``.
    """
    SIDES = ('before', 'after')
    learns = False

    def __init__(self, side: str = 'before', adapt: bool = False) -> None:
        super().__init__(adapt=adapt)
        if side not in self.SIDES:
            raise ValueError(f'SharedWeights: unknown side={side!r}; allowed: {", ".join(self.SIDES)}')
        self.side = side

    def new_parameters(self, shapes: dict[str, Shape], device: torch.device,
                       dtype: torch.dtype) -> dict[str, nn.Parameter]:
        return {}

    def fuse(self, parameters: dict[str, Tensor], pairs: dict[str, Pair],
             shapes: dict[str, Shape] | None = None) -> dict[str, Tensor]:
        order = slice(None) if self.side == 'before' else slice(None, None, -1)
        return {name: next(tensor for tensor in pair[order] if tensor is not None) for name, pair in pairs.items()}

    @torch.no_grad()
    def fit(self, targets: dict[str, Tensor], pairs: dict[str, Pair], shapes: dict[str, Shape] | None = None) -> Fit:
        return Fit({}, residual(targets, self.fuse({}, pairs)))

    def _settings(self) -> str:
        return f'side={self.side!r}' + (', adapt=True' if self.adapt else '')


@OPERATORS.register_module()
class StochasticDepth(Operator):
    r"""The whole block, left out at random while training: for each image anew, with probability p.

    .. math:: h_{out} = h_{in} + \frac{m}{1 - p}\,(B(h_{in}) - h_{in}), \qquad m ∼ \mathrm{Bernoulli}(1 - p)

    and :math:`B(h_{in})` in eval mode, which is the mean. With ``fusion=dict(type='OwnWeights')`` the blocks of the
    plan keep weights of their own, and the model has the baseline's state dict. It saves no computation: each image of
    a batch is drawn by itself, so that all processes of DDP use the same parameters.

    Args:
        rate: p, at least 0 and below 1. To leave out on average as many blocks as a plan replaces, take a plan of all
            blocks that can be replaced and the ratio of these numbers.

    Raises:
        ValueError: ``rate`` out of range.

    Source: "Deep Networks with Stochastic Depth", arXiv 1603.09382; by image and scaled while training, as timm's
    ``DropPath``, but around the whole block.
    """

    def __init__(self, rate: float) -> None:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f'StochasticDepth: rate must be at least 0 and below 1, got {rate!r}')
        self.rate = float(rate)

    def why_not(self, block: nn.Module) -> str | None:
        name = f'StochasticDepth can\'t leave out a {type(block).__name__}'
        ways = other_ways_forward(type(block))
        if ways:
            return f'{name}, which its backbone also runs by {ways[0]}()'
        if mlp(block) is None and not keeps_its_shape(block):
            return f'{name}: it isn\'t known to keep the width and the stride'
        return None

    def template(self, block: nn.Module) -> nn.Module:
        block.register_forward_hook(_LeaveOut(self.rate))
        return block

    def __repr__(self) -> str:
        return f'StochasticDepth(rate={self.rate})'


class _LeaveOut:
    """The forward hook that leaves its module out."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        if not block.training:
            return output
        x = inputs[0]
        if isinstance(output, list):  # TridentNet's branches, each of them drawn by itself
            return [self._draw(*branch) for branch in zip(x, output, strict=True)]
        return self._draw(x, output)

    def _draw(self, x: Tensor, output: Tensor) -> Tensor:
        stays = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x + stays.to(x.dtype) / (1 - self.rate) * (output - x)


def always_run_(model: nn.Module) -> None:
    """No block of ``model`` is left out from now on."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _LeaveOut)]:
            del module._forward_hooks[key]
