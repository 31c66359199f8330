"""Removed blocks that fade out in the first steps of a training."""
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..._torch_compat import is_compiling, map_pairs
from ..computing_layer import ComputingLayer


class Fade:
    r"""Lets a removed block leave step by step, so that the blocks around it have time to get used to that.

    .. math:: h_{out} = B(h) + α\,(C(h) - B(h))

    with the removed block B, which doesn't learn, and the computing layer C. Gradients go through both to h. In eval
    mode the computing layer is alone. As long as it lasts, a step also costs two forward runs of B and a backward one,
    but hardly more memory: B keeps its input alone for backward (:func:`torch.utils.checkpoint.checkpoint`).

    Args:
        layer: still has its removed block, which is moved to the layer's device.
    """

    def __init__(self, layer: ComputingLayer) -> None:
        like = next(layer.kept[0].parameters())
        self.layer = layer
        self.block = layer.removed.block.to(like.device).eval().requires_grad_(False)
        self.alpha = torch.zeros((), device=like.device)  # a tensor: a number would be compiled in
        self.handle = layer.register_forward_hook(self._mix, with_kwargs=True)

    def set_(self, alpha: float) -> None:
        """Set α for the next step; from 1 on the computing layer is alone for good, and the block is dropped."""
        self.alpha.fill_(alpha)
        if alpha >= 1:
            self.handle.remove()
            self.layer.forget_block_()

    def _mix(self, layer: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        if not layer.training:
            return out
        if is_compiling():  # then the compiler decides what is kept
            block = self.block(*args, **kwargs)
        else:  # neither dropout nor statistics that a second run would change: it is in eval mode
            block = checkpoint(self.block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return map_pairs(self._mixture, block, out)

    def _mixture(self, block: Any, layer: Any) -> Any:
        """Of two tensors of outputs; what else there is among these is the layer's."""
        return torch.lerp(block.to(layer), layer, self.alpha.to(layer)) if isinstance(layer, Tensor) else layer
