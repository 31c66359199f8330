"""What all fusions share: mixtures of the two neighbours' tensors with learnable factors."""
import torch
from torch import Tensor

from ..checks import check_number
from ..resize import Shape

Pair = tuple[Tensor | None, Tensor | None]
"""A tensor of the neighbours before and after, in the size of the tensor to make; None where there is none."""


class Fusion:
    r"""What all fusions share: a mixture :math:`a·θ_p + b·θ_n`; :math:`(a, b)` is the block's, or every tensor has one.

    The computing layer gets one parameter, ``coeff``, holding all pairs: of shape ``(2,)`` where there is one pair
    for the whole block, ``(2, N)`` where there is one for each of its N tensors.

    Args:
        init: start of every a and b.
        adapt: make tensors from neighbours of other sizes, and of neighbouring stages, where there are no others
            (see :mod:`~rl_mmdet.replacement.resize`). The first and last blocks of a stage can then be replaced.

    Raises:
        TypeError: ``adapt`` isn't a bool.
        ValueError: ``init`` isn't a finite number.
    """
    one_pair = False

    def __init__(self, init: float = 0.5, adapt: bool = False) -> None:
        name = type(self).__name__
        check_number(f'{name}: init', init)
        if not isinstance(adapt, bool):
            raise TypeError(f'{name}: adapt must be True or False, got {adapt!r}')
        self.init = float(init)
        self.adapt = adapt

    def check(self, shapes: dict[str, Shape]) -> None:
        """Raise a ValueError if it can't make tensors of these shapes."""

    def start(self, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        """From what the parameters of one replaced block start, whose tensors to make have ``shapes``.

        Here ``coeff`` at ``init``, in float64: the average of the neighbours, times 2·init.
        """
        size = (2,) if self.one_pair else (2, len(shapes))
        return {'coeff': torch.full(size, self.init, dtype=torch.float64)}

    def fuse(self, parameters: dict[str, Tensor], pairs: dict[str, Pair]) -> dict[str, Tensor]:
        """Make all tensors of the block that are to be made.

        Args:
            parameters: the fusion's.
            pairs: the neighbours' tensors for each of them, in the order of the block's tensors.
        """
        return _mix(self._factors(parameters['coeff'], pairs), pairs)

    def _factors(self, coeff: Tensor, pairs: dict[str, Pair]) -> dict[str, tuple[Tensor, Tensor]]:
        """For every tensor its a and b, shaped to be multiplied with it; the same ones where there is one pair."""
        if self.one_pair:
            return dict.fromkeys(pairs, tuple(coeff))
        return dict(zip(pairs, map(tuple, coeff.T), strict=True))

    def _settings(self) -> str:
        return f'init={self.init}' + (', adapt=True' if self.adapt else '')

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self._settings()})'


def _mix(factors: dict[str, Pair], pairs: dict[str, Pair]) -> dict[str, Tensor]:
    """a·before + b·after for every tensor; of a tensor that only one side has, that one's term."""
    # not "None in pair", which would ask tensors whether they equal None: that takes longer than to multiply them
    whole = [name for name, (before, after) in pairs.items() if before is not None and after is not None]
    if torch.is_grad_enabled() or not whole:  # torch has no gradient for factors of its calls for several tensors
        made = {name: factors[name][0] * pairs[name][0] + factors[name][1] * pairs[name][1] for name in whole}
    else:
        before, after = (_multiplied([pairs[name][side] for name in whole], [factors[name][side] for name in whole])
                         for side in (0, 1))
        torch._foreach_add_(before, after)
        made = dict(zip(whole, before, strict=True))
    for name, pair in pairs.items():
        if name not in made:
            made[name] = next(factor * tensor for factor, tensor in zip(factors[name], pair, strict=True)
                              if tensor is not None)
    return {name: made[name] for name in pairs}


def _multiplied(tensors: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
    """Each tensor times its factor; where all have the same one, CUDA does it in one launch."""
    same = not factors[0].ndim and all(factor is factors[0] for factor in factors)
    return torch._foreach_mul(tensors, factors[0] if same else factors)
