"""What light operators (RL-v2) share: a few per cent of a block's computation, or nothing, in its place."""
from torch import nn

from ..._torch_compat import other_ways_forward
from ..block_structure import convolutions, keeps_its_shape
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
        fitting = [cls.__name__ for cls in OPERATORS.module_dict.values() if cls.light and cls is not type(self)
                   and cls().misfit(block) is None]
        return f'{name}: {reason}; what fits: {", ".join([*fitting, "FullBlock"])}'

    def misfit(self, block: nn.Module) -> str | None:
        """What it can't stand for about ``block``, in a few words; None if it can."""
        raise NotImplementedError


def misfit_of_convolutions(block: nn.Module) -> str | None:
    """Why ``block`` isn't a block of convolutions that keeps its shape; None if it is one."""
    if not convolutions(block):
        return 'it has no convolution'
    return None if keeps_its_shape(block) else 'it changes the width or the stride'
