"""What all fusions share: mixtures of the two neighbours' tensors with learnable factors."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._torch_compat import is_recorded
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
    if is_recorded() or not whole:
        made = {name: factors[name][0] * pairs[name][0] + factors[name][1] * pairs[name][1] for name in whole}
    else:
        before, after = ([pairs[name][side] for name in whole] for side in (0, 1))
        a, b = (_once([factors[name][side] for name in whole]) for side in (0, 1))
        made = dict(zip(whole, _Mixtures.apply(len(whole), *before, *after, *a, *b), strict=True))
    for name, pair in pairs.items():
        if name not in made:
            made[name] = next(factor * tensor for factor, tensor in zip(factors[name], pair, strict=True)
                              if tensor is not None)
    return {name: made[name] for name in pairs}


def _once(factors: list[Tensor]) -> list[Tensor]:
    """The factors of several tensors; the one number that all have stands there once."""
    return factors[:1] if not factors[0].ndim and all(factor is factors[0] for factor in factors) else factors


class _Mixtures(torch.autograd.Function):
    r""":math:`a·θ_p + b·θ_n` for several tensors, in a few calls for all of them; torch's own have no such gradient.

    .. math:: \frac{∂L}{∂θ_p} = a\,g, \qquad \frac{∂L}{∂a} = \sum g\,θ_p, \qquad g = \frac{∂L}{∂(aθ_p + bθ_n)}

    and likewise for b and θ_n; the sum is over what a stands for, all tensors where they have the same one.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        (before, a), (after, b) = _sides(count, tensors)
        made = _multiplied(before, a)
        torch._foreach_add_(made, _multiplied(after, b))
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sides = _sides(len(grads), ctx.saved_tensors)
        wanted = _sides(len(grads), ctx.needs_input_grad[1:])
        of_tensors, of_factors = [], []
        for (tensors, factors), (tensors_wanted, factors_wanted) in zip(sides, wanted, strict=True):
            of_tensors += _multiplied(grads, factors) if any(tensors_wanted) else [None] * len(grads)
            of_factors += _summed(torch._foreach_mul(grads, tensors), factors) if any(factors_wanted) else [
                None] * len(factors)
        return None, *of_tensors, *of_factors


def _sides(count: int, items: Sequence) -> tuple[tuple[Sequence, Sequence], tuple[Sequence, Sequence]]:
    """What is of the neighbours before, and after: of their tensors, and of the factors of these."""
    factors = items[2 * count:]
    half = len(factors) // 2
    return (items[:count], factors[:half]), (items[count:2 * count], factors[half:])


def _multiplied(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor times its factor; where all have the same one, CUDA does it in one launch."""
    return list(torch._foreach_mul(tensors, factors if len(factors) > 1 or factors[0].ndim else factors[0]))


def _summed(products: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """The products' sums over what each factor multiplies."""
    if len(factors) < len(products):
        return [torch.stack([product.sum() for product in products]).sum()]
    return [product.sum_to_size(factor.shape) for product, factor in zip(products, factors, strict=True)]
