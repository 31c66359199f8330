"""RL-v1's fusion: two learnable numbers for a whole block."""
from ..registry import FUSIONS
from .fusion import Fusion


@FUSIONS.register_module()
class ScalarFusion(Fusion):
    r"""RL-v1: one pair of learnable scalars per replaced block.

    .. math:: θ_i = a·θ_p + b·θ_n

    for every parameter tensor of the block, with :math:`θ_p, θ_n` those of the nearest kept blocks before and
    after it. A tensor whose shape agrees with only one neighbour is that one's, times its scalar.

    ``coeff`` has shape ``(2,)`` and holds :math:`(a, b)`: 2 numbers per replaced block.

    Args:
        init, adapt: see :class:`Fusion`.

    Source: "Replacement Learning: Training Vision Tasks with Fewer Learnable Parameters", arXiv 2410.01239.
    """

    one_pair = True
