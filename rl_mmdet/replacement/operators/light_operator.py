"""What light operators (RL-v2) share: a few per cent of a block's computation, the identity at scale 0."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..block_structure import convolutions, keeps_its_shape, other_ways_forward
from ..checks import check_number
from ..registry import OPERATORS
from .operator import Operator


class LightOperator(Operator):
    """Computes a few per cent of what the block does, in the place of blocks that keep width and stride."""
    light = True

    def why_not(self, block: nn.Module) -> str | None:
        name = f'{type(self).__name__} can\'t stand for a {type(block).__name__}'
        ways = other_ways_forward(type(block))
        if ways:
            return f'{name}, which its backbone also runs by {ways[0]}(); FullBlock can'
        reason = self.misfit(block)
        if reason is None:
            return None
        fitting = [cls.__name__ for cls in OPERATORS.module_dict.values() if cls.light and cls.repeatable
                   and cls is not type(self) and cls().misfit(block) is None]
        return f'{name}: {reason}; what fits: {", ".join([*fitting, "FullBlock"])}'

    def misfit(self, block: nn.Module) -> str | None:
        """What it can't stand for about ``block``, in a few words; None if it can."""
        raise NotImplementedError


class ScaledOperator(LightOperator):
    """:math:`h_{out} = h_{in} + γ ⊙ C(h_{in})`, γ learnable, one number per channel.

    Args:
        scale: start of all γ; at 0 the start is the identity, and the fusion learns from the second step on.

    Raises:
        ValueError: ``scale`` isn't a finite number.
    """

    def __init__(self, scale: float) -> None:
        self.scale = float(check_number(f'{type(self).__name__}: scale', scale))

    def start(self, block: nn.Module) -> dict[str, Tensor]:
        return {'scale': torch.full((self.channels(block),), self.scale, device='cpu')}  # also on meta

    def channels(self, block: nn.Module) -> int:
        """Channels of the block's input and output."""
        return next(iter(convolutions(block).values())).in_channels

    def __repr__(self) -> str:
        return f'{type(self).__name__}(scale={self.scale})'


def misfit_of_convolutions(block: nn.Module) -> str | None:
    """Why ``block`` isn't a block of convolutions that keeps its shape; None if it is one."""
    if not convolutions(block):
        return 'it has no convolution'
    return None if keeps_its_shape(block) else 'it changes the width or the stride'


def unit_length(weight: Tensor) -> Tensor:
    """Each output channel's part brought to length 1; zeros stay zeros, in half precision, too."""
    return F.normalize(weight.flatten(1), dim=1, eps=tiny_of(weight)).view_as(weight)


def tiny_of(weight: Tensor) -> float:
    """The shortest length that a weight is divided by.

    Shorter ones have squares that are 0 in float32, and gradients divided by much less wouldn't be finite.
    """
    return max(torch.finfo(weight.dtype).tiny, 1e-19)
