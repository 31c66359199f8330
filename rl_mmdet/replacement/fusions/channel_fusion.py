"""RL-v2: two learnable numbers for every output channel."""
from ..registry import FUSIONS
from ..resize import Shape, kind_of
from .fusion import Fusion


@FUSIONS.register_module()
class ChannelFusion(Fusion):
    r"""RL-v2: one pair of learnable scalars per output channel.

    .. math:: θ_{i,c} = a_c·θ_{p,c} + b_c·θ_{n,c}

    for every output channel c of every weight, and every head (last axis) of a position table. A vector (bias,
    norm, layer scale) has one number per channel already, so it gets one pair as a whole.

    ``coeff`` has shape ``(2, N)``: for a Bottleneck of width w :math:`2·6w` numbers and 2 per vector in place of
    :math:`17w^2`, for a ViT block of C channels :math:`2·9C` in place of :math:`12C^2`.

    Args:
        init, adapt: see :class:`Fusion`.

    Source: "Replacement Learning: Training Neural Networks with Fewer Parameters", arXiv 2605.19533 ("learnable
    block"); the form is ours.
    """

    def groups(self, name: str, shape: Shape) -> int:
        kind = kind_of(name, shape)
        return 1 if kind == 'vector' else shape[0] if kind == 'weight' else shape[-1]
