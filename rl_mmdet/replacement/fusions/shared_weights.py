"""The weights of the block before as they are: the reference that a fusion has to beat."""
from torch import Tensor

from ..registry import FUSIONS
from ..resize import Shape
from .fusion import Fusion, Pair


@FUSIONS.register_module()
class SharedWeights(Fusion):
    r"""The tensors of the kept block before: :math:`θ_i = θ_p`, RL-v1 with :math:`a = 1, b = 0` fixed.

    A tensor that it doesn't have comes from the kept block after. Nothing is learned for the replaced block. With
    ``gradient=dict(mode='coupled')`` it is ordinary weight sharing: the neighbour learns from both places.

    Args:
        adapt: see :class:`~rl_mmdet.replacement.fusions.Fusion`.
    """

    def __init__(self, adapt: bool = False) -> None:
        super().__init__(adapt=adapt)

    def start(self, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        return {}

    def fuse(self, parameters: dict[str, Tensor], pairs: dict[str, Pair]) -> dict[str, Tensor]:
        return {name: next(tensor for tensor in pair if tensor is not None) for name, pair in pairs.items()}

    def _settings(self) -> str:
        return 'adapt=True' if self.adapt else ''
