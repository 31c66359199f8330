"""Operators: as what; the computation in which the fused tensors are used."""
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .registry import OPERATORS


@OPERATORS.register_module()
class FullBlock:
    """RL-v1: the whole removed block, :math:`h_{out} = B_i(h_{in}; θ_i)`, with the fused tensors as its weights.

    It costs the forward computation of the block it stands for; what it saves are learnable parameters, their
    gradients and their optimizer state. The materialized model is the baseline architecture.
    """

    def __call__(self, template: nn.Module, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run ``template``, the removed block without weights of its own, on the fused ``tensors``."""
        return functional_call(template, tensors, args, kwargs)

    def __repr__(self) -> str:
        return 'FullBlock()'
