"""What all fusions share: mixtures of the two neighbours' tensors with learnable factors."""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_number
from ..resize import Shape, kind_of

Pair = tuple[Tensor | None, Tensor | None]
"""A tensor of the neighbours before and after, in the size of the tensor to make; None where there is none."""


@dataclass(frozen=True)
class Fit:
    """What a fusion's parameters should start from, given the weights of the removed block.

    Args:
        parameters: value of each of the fusion's parameters.
        residual: :math:`\\lVert θ_i - θ̂_i \\rVert / \\lVert θ_i \\rVert` over all tensors of the block, no unit;
            0 is a perfect reconstruction, 1 is what zero weights would give.
    """
    parameters: dict[str, Tensor]
    residual: float


def residual(targets: dict[str, Tensor], made: dict[str, Tensor]) -> float:
    """How far ``made`` is from ``targets``, as a :class:`Fit` has it."""
    error = sum((target.double() - made[name].double()).square().sum() for name, target in targets.items())
    size = sum(target.double().square().sum() for target in targets.values())
    return (error / size).sqrt().item() if size > 0 else 0.


class Fusion:
    r"""What all fusions share: a mixture :math:`a·θ_p + b·θ_n`, whose :math:`(a, b)` is common to a group of entries.

    The computing layer gets one parameter, ``coeff``, holding all pairs: of shape ``(2,)`` where there is one pair
    for the whole block, ``(2, N)`` where there are N, in the order of the block's tensors.

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

    def groups(self, name: str, shape: Shape) -> int:
        """How many pairs (a, b) a tensor has."""
        return 1

    def check(self, shapes: dict[str, Shape]) -> None:
        """Raise a ValueError if it can't make tensors of these shapes."""

    def new_parameters(self, shapes: dict[str, Shape], device: torch.device,
                       dtype: torch.dtype) -> dict[str, nn.Parameter]:
        """The learnable parameters of one replaced block, whose tensors to make have ``shapes``."""
        return {name: nn.Parameter(value.to(device, dtype)) for name, value in self._start(shapes).items()}

    def fuse(self, parameters: dict[str, Tensor], pairs: dict[str, Pair]) -> dict[str, Tensor]:
        """Make all tensors of the block that are to be made.

        Args:
            parameters: the fusion's.
            pairs: the neighbours' tensors for each of them, in the order of the block's tensors.
        """
        shapes = dict.fromkeys(pairs, ()) if self.one_pair else {name: _shape_of(pair) for name, pair in pairs.items()}
        return _mix(dict(self._pairs_of(parameters['coeff'], shapes)), pairs)

    @torch.no_grad()
    def fit(self, targets: dict[str, Tensor], pairs: dict[str, Pair], shapes: dict[str, Shape] | None = None,
            least_squares: bool = False) -> Fit:
        """The start of the parameters, and how far it is from the removed block's own weights.

        Args:
            targets: those of the block's tensors that are known.
            pairs: the neighbours' tensors for these.
            shapes: of all tensors to make, in their order; None if these are the ``targets``.
            least_squares: choose the pairs (a, b) that reconstruct these weights best; else they are all ``init``.
        """
        shapes = shapes or {name: tuple(target.shape) for name, target in targets.items()}
        like = next(iter(targets.values()))
        start = {name: value.to(like.device) for name, value in self._start(shapes).items()}
        double = {name: _double(pair) for name, pair in pairs.items()}
        if least_squares:
            start['coeff'] = self._least_squares({n: t.double() for n, t in targets.items()}, double, shapes)
        factors = {name: each for name, each in self._pairs_of(start['coeff'], shapes) if name in pairs}
        made = _mix(factors, double)
        return Fit({name: value.to(like.dtype) for name, value in start.items()}, residual(targets, made))

    def _start(self, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        """Start values in float64: the average of the neighbours, times 2·init."""
        size = (2,) if self.one_pair else (2, sum(self.groups(name, shape) for name, shape in shapes.items()))
        return {'coeff': torch.full(size, self.init, dtype=torch.float64)}

    def _pairs_of(self, coeff: Tensor, shapes: dict[str, Shape]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """For every tensor its a and b, shaped to be multiplied with it; the same ones where there is one pair."""
        if self.one_pair:
            yield from dict.fromkeys(shapes, tuple(coeff)).items()
            return
        start = 0
        for name, shape in shapes.items():
            count = self.groups(name, shape)
            mine = coeff[:, start:start + count]
            start += count
            yield name, tuple(mine.flatten() if count == 1 else (side.view(_per_group(name, shape)) for side in mine))

    def _least_squares(self, targets: dict[str, Tensor], pairs: dict[str, Pair], shapes: dict[str, Shape]) -> Tensor:
        r"""Minimise :math:`\lVert θ_i - aθ_p - bθ_n \rVert^2` for each pair through its 2×2 normal equations."""
        like = next(iter(targets.values()))
        systems = []
        for name, shape in shapes.items():
            count = self.groups(name, shape)
            if name in targets:
                target = _by_group(targets[name], name, count)
                sides = torch.stack([_by_group(_or_zeros(side, like=targets[name]), name, count)
                                     for side in pairs[name]], 1)
                systems.append((sides @ sides.mT, (sides @ target[..., None])[..., 0]))
            elif not self.one_pair:  # a system whose solution is the start
                systems.append((torch.eye(2).to(like).expand(count, 2, 2), like.new_full((count, 2), self.init)))
        if self.one_pair:
            systems = [tuple(sum(side) for side in zip(*systems, strict=True))]
        coeff = torch.cat([(torch.linalg.pinv(gram, hermitian=True) @ right[..., None])[..., 0]
                           for gram, right in systems])
        return coeff[0] if self.one_pair else coeff.T.contiguous()

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


def _shape_of(pair: Pair) -> Shape:
    """The shape of a pair's tensors."""
    return tuple(next(tensor for tensor in pair if tensor is not None).shape)


def _per_group(name: str, shape: Shape) -> tuple[int, ...]:
    """The shape in which one number per group multiplies a tensor: heads are a table's last axis."""
    return (-1,) + (1,) * (len(shape) - 1) if kind_of(name, shape) == 'weight' else (-1,)


def _by_group(tensor: Tensor, name: str, count: int) -> Tensor:
    """(groups, entries): what one pair multiplies in a row."""
    if count == 1:
        return tensor.reshape(1, -1)
    weight = kind_of(name, tuple(tensor.shape)) == 'weight'
    return tensor.flatten(1) if weight else tensor.reshape(-1, count).T


def _or_zeros(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor


def _double(pair: Pair) -> Pair:
    return tuple(None if tensor is None else tensor.double() for tensor in pair)
