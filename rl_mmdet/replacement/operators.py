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

    def __call__(self, template: nn.Module, tensors: dict[str, Tensor], method: str, *args: Any, **kwargs: Any) -> Any:
        """Run ``method`` of ``template``, the removed block without weights of its own, on the fused ``tensors``."""
        if method == 'forward':
            return functional_call(template, tensors, args, kwargs)
        return functional_call(_Method(template, method), {f'block.{name}': tensor for name, tensor in tensors.items()},
                               args, kwargs)

    def __repr__(self) -> str:
        return 'FullBlock()'


class _Method(nn.Module):
    """Another method of a block, as the forward of a module: :func:`functional_call` runs nothing else."""

    def __init__(self, block: nn.Module, method: str) -> None:
        super().__init__()
        self.block = block
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.block, self.method)(*args, **kwargs)
