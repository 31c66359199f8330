"""RL-v2: a mixture of the neighbours with a learned low-rank correction."""
import math

import torch
from torch import Tensor

from ..checks import check_number
from ..registry import FUSIONS
from ..resize import Shape, kind_of
from .fusion import Fusion, Pair


@FUSIONS.register_module()
class TransformFusion(Fusion):
    r"""RL-v2: a learned mixture of the neighbours, corrected by a low-rank map of its output channels.

    .. math:: θ_i = (I + U D^⊤)\,(a·θ_p + b·θ_n)

    with one pair :math:`(a, b)` per tensor and, for weights (seen as matrices of o output channels),
    :math:`U, D ∈ R^{o × r}`. :math:`U` starts at zero and :math:`D` at orthonormal cosines, so the start is the
    average of the neighbours. Vectors and position tables have the mixture only.

    The computing layer gets ``coeff`` of shape ``(2, tensors)`` and, if r > 0, ``up`` and ``down`` of shape
    ``(O, r)`` with the weights' U and D below one another, O their output channels together. To make a weight of n
    numbers takes :math:`2·2·r·n` FLOPs; the neighbours' tensors stay as they are.

    Args:
        rank: r, the same for all weights; None takes the largest that keeps to ``share``.
        share: most learnable parameters per replaced block, as a part of those of the tensors they make. Where
            not even rank 1 fits, the mixture is left alone.
        init, adapt: see :class:`Fusion`.

    Raises:
        ValueError: ``share`` outside of (0, 1], a negative ``rank``, or one larger than a weight's output channels.

    Source: "Replacement Learning: Training Neural Networks with Fewer Parameters", arXiv 2605.19533 ("learnable
    block"); the form is ours.
    """

    def __init__(self, rank: int | None = None, share: float = 0.05, init: float = 0.5,
                 adapt: bool = False) -> None:
        super().__init__(init, adapt)
        if rank is not None:
            check_number('TransformFusion: rank', rank, whole=True, least=0, hint='None: the largest for share')
        check_number('TransformFusion: share', share, above=0, most=1)
        self.rank = rank
        self.share = share

    def check(self, shapes: dict[str, Shape]) -> None:
        self.rank_for(shapes)

    def rank_for(self, shapes: dict[str, Shape]) -> int:
        """The rank of the correction for a block whose tensors to make have ``shapes``."""
        weights = {name: shape for name, shape in shapes.items() if kind_of(name, shape) == 'weight'}
        if not weights:
            return 0
        limit, name = min((shape[0], name) for name, shape in weights.items())
        if self.rank is None:
            budget = self.share * sum(math.prod(shape) for shape in shapes.values()) - 2 * len(shapes)
            return max(0, min(limit, int(budget // (2 * sum(shape[0] for shape in weights.values())))))
        if self.rank > limit:
            raise ValueError(f'TransformFusion: rank={self.rank}, but {name} {shapes[name]} allows at most {limit}')
        return self.rank

    def fuse(self, parameters: dict[str, Tensor], pairs: dict[str, Pair]) -> dict[str, Tensor]:
        made, start = super().fuse(parameters, pairs), 0
        for name, tensor in made.items() if 'up' in parameters else ():
            if kind_of(name, tuple(tensor.shape)) == 'weight':
                up, down = (parameters[key][start:start + len(tensor)] for key in ('up', 'down'))
                start += len(tensor)
                made[name] = tensor + (up @ (down.T @ tensor.flatten(1))).view_as(tensor)
        return made

    def start(self, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        start = super().start(shapes)
        rank = self.rank_for(shapes)
        if rank:
            channels = [shape[0] for name, shape in shapes.items() if kind_of(name, shape) == 'weight']
            start['down'] = torch.cat([_cosines(count, rank) for count in channels])
            start['up'] = torch.zeros_like(start['down'])
        return start

    def _settings(self) -> str:
        return (f'rank={self.rank}, ' if self.rank is not None else f'share={self.share}, ') + super()._settings()


def _cosines(size: int, count: int) -> Tensor:
    """The first ``count`` columns of the orthonormal cosine basis of ``size`` numbers, the constant left for last."""
    n, k = torch.arange(size, dtype=torch.float64)[:, None], (torch.arange(count) + 1) % size
    basis = torch.cos(math.pi / size * (n + 0.5) * k) * math.sqrt(2 / size)
    return torch.where(k == 0, basis / math.sqrt(2), basis)
