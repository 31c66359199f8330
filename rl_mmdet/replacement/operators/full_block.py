"""RL-v1's operator: the whole removed block."""
from ..registry import OPERATORS
from .operator import Operator


@OPERATORS.register_module()
class FullBlock(Operator):
    """RL-v1: the whole removed block, :math:`h_{out} = B_i(h_{in}; θ_i)`, with the fused tensors as its weights.

    It costs the forward computation of the block it stands for; what it saves are learnable parameters, their
    gradients and their optimizer state. The materialized model is the baseline architecture.

    Source: arXiv 2410.01239.
    """
