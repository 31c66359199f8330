"""A neighbour's weights as they are: the reference that a fusion has to beat."""
from torch import Tensor

from ..registry import FUSIONS
from ..resize import Shape
from .fusion import Fusion, Pair


@FUSIONS.register_module()
class SharedWeights(Fusion):
    r"""A neighbour's tensors as they are: :math:`θ_i = θ_p`, RL-v1 with :math:`a = 1, b = 0` fixed. It learns nothing.

    With ``gradient=dict(mode='coupled')`` it is ordinary weight sharing: the neighbour learns from both places.

    Args:
        side: ``'before'`` or ``'after'``: which neighbour. A tensor that it doesn't have comes from the other one.
        adapt: see :class:`~rl_mmdet.replacement.fusions.Fusion`.

    Raises:
        ValueError: another ``side``.
    """
    SIDES = ('before', 'after')

    def __init__(self, side: str = 'before', adapt: bool = False) -> None:
        super().__init__(adapt=adapt)
        if side not in self.SIDES:
            raise ValueError(f'SharedWeights: unknown side={side!r}; allowed: {", ".join(self.SIDES)}')
        self.side = side

    def start(self, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        return {}

    def fuse(self, parameters: dict[str, Tensor], pairs: dict[str, Pair]) -> dict[str, Tensor]:
        order = slice(None) if self.side == 'before' else slice(None, None, -1)
        return {name: next(tensor for tensor in pair[order] if tensor is not None) for name, pair in pairs.items()}

    def _settings(self) -> str:
        return f'side={self.side!r}' + (', adapt=True' if self.adapt else '')
