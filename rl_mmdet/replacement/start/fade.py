"""Removed blocks that fade out while the model is trained."""
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..computing_layer import ComputingLayer


class Fade:
    r"""Lets a removed block leave step by step.

    .. math:: h_{out} = B(h) + α\,(C(h) - B(h))

    with the removed block B, which is fixed, and the computing layer C. Gradients go through both. In eval mode the
    computing layer is alone.

    Args:
        layer: still has its removed block.

    Attributes:
        alpha: α, from 0 to 1.
    """

    def __init__(self, layer: ComputingLayer) -> None:
        self.layer = layer
        self.alpha = 0.
        self.block = layer.removed.block.to(next(layer.kept[0].parameters()).device).eval().requires_grad_(False)
        self.handle = layer.register_forward_hook(self._mix, with_kwargs=True)

    def _mix(self, layer: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        if not layer.training:
            return out
        return tree_map(self._mixture, self.block(*args, **kwargs), out)

    def _mixture(self, block: Any, layer: Any) -> Any:
        return torch.lerp(block.to(layer.dtype), layer, self.alpha) if isinstance(layer, Tensor) else layer

    def end(self) -> None:
        """From now on the computing layer is alone; the removed block is dropped."""
        self.handle.remove()
        self.layer.forget_block_()
