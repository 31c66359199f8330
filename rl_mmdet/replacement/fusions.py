"""Fusions: with what; the learnable map from the two neighbours' tensors to the tensor that is used."""
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .registry import FUSIONS
from .resize import Shape, kind_of

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
        init: start of every a and b without pretrained weights.
        pretrained: start when the removed block's weights are known: ``'average'`` (all are ``init``) or
            ``'least_squares'`` (the pairs that reconstruct them best). docs/pretrained.md has the measurement
            behind the default.
        adapt: make tensors from neighbours of other sizes, and of neighbouring stages, where there are no others
            (see :mod:`~rl_mmdet.replacement.resize`). The first and last blocks of a stage can then be replaced.

    Raises:
        TypeError: ``adapt`` isn't a bool.
        ValueError: ``init`` isn't a finite number, or ``pretrained`` is unknown.
    """
    PRETRAINED = ('average', 'least_squares')
    one_pair = False
    learns = True

    def __init__(self, init: float = 0.5, pretrained: str = 'average', adapt: bool = False) -> None:
        name = type(self).__name__
        if isinstance(init, bool) or not isinstance(init, (int, float)) or not math.isfinite(init):
            raise ValueError(f'{name}: init must be a finite number, got {init!r}')
        if pretrained not in self.PRETRAINED:
            raise ValueError(f'{name}: unknown pretrained={pretrained!r}; allowed: {", ".join(self.PRETRAINED)}')
        if not isinstance(adapt, bool):
            raise TypeError(f'{name}: adapt must be True or False, got {adapt!r}')
        self.init = float(init)
        self.pretrained = pretrained
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

    def fuse(self, parameters: dict[str, Tensor], pairs: dict[str, Pair],
             shapes: dict[str, Shape] | None = None) -> dict[str, Tensor]:
        """Synthesise tensors of the block, each of the shape its sources have.

        Args:
            parameters: the fusion's.
            pairs: the neighbours' tensors for those to synthesise.
            shapes: of all of the block's tensors to make, in their order; None if these are in ``pairs``.
        """
        shapes = shapes or {name: _shape(pair) for name, pair in pairs.items()}
        return {name: _mix(a, b, pairs[name]) for name, (a, b) in self._pairs_of(parameters['coeff'], shapes)
                if name in pairs}

    @torch.no_grad()
    def fit(self, targets: dict[str, Tensor], pairs: dict[str, Pair], shapes: dict[str, Shape] | None = None) -> Fit:
        """Choose the start of the parameters from the removed block's own weights.

        Args:
            targets: those of the block's tensors that are known.
            pairs: the neighbours' tensors for these.
            shapes: of all tensors to make, in their order; None if these are the ``targets``.
        """
        shapes = shapes or {name: tuple(target.shape) for name, target in targets.items()}
        like = next(iter(targets.values()))
        start = {name: value.to(like.device) for name, value in self._start(shapes).items()}
        double = {name: _double(pair) for name, pair in pairs.items()}
        if self.pretrained == 'least_squares':
            start['coeff'] = self._least_squares({n: t.double() for n, t in targets.items()}, double, shapes)
        made = {name: _mix(a, b, double[name]) for name, (a, b) in self._pairs_of(start['coeff'], shapes)
                if name in pairs}
        return Fit({name: value.to(like.dtype) for name, value in start.items()}, residual(targets, made))

    def _start(self, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        """Start values in float64: the average of the neighbours, times 2·init."""
        size = (2,) if self.one_pair else (2, sum(self.groups(name, shape) for name, shape in shapes.items()))
        return {'coeff': torch.full(size, self.init, dtype=torch.float64)}

    def _pairs_of(self, coeff: Tensor, shapes: dict[str, Shape]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """For every tensor its a and b, shaped to be multiplied with it."""
        start = 0
        for name, shape in shapes.items():
            count = self.groups(name, shape)
            mine = coeff if self.one_pair else coeff[:, start:start + count]
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
        return f'init={self.init}, pretrained={self.pretrained!r}' + (', adapt=True' if self.adapt else '')

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self._settings()})'


@FUSIONS.register_module()
class ScalarFusion(Fusion):
    r"""RL-v1: one pair of learnable scalars per replaced block.

    .. math:: θ_i = a·θ_p + b·θ_n

    for every parameter tensor of the block, with :math:`θ_p, θ_n` those of the nearest kept blocks before and
    after it. A tensor whose shape agrees with only one neighbour is that one's, times its scalar.

    ``coeff`` has shape ``(2,)`` and holds :math:`(a, b)`: 2 numbers per replaced block.

    Args:
        init, pretrained, adapt: see :class:`Fusion`.

    Source: "Replacement Learning: Training Vision Tasks with Fewer Learnable Parameters", arXiv 2410.01239.
    """

    one_pair = True


@FUSIONS.register_module()
class OwnWeights(ScalarFusion):
    """No fusion: what the operator runs has weights of its own, which start as the average of the neighbours.

    There are no computing layers then. It is what a materialized model with light operators is loaded into, and
    the ablation that tells what the neighbours' weights are good for: the light operator alone. A baseline's state
    dict doesn't start its replaced blocks; with ``FullBlock`` the model is the baseline itself.

    Args:
        init, adapt: see :class:`Fusion`.
        learn: False fixes these weights, and the affine parameters of norms with them, as they were initialised or
            loaded; running statistics go on. From scratch mmdet's ResNet starts the last norm of every block at zero
            (``zero_init_residual``), and such a block would stay the identity.

    Raises:
        TypeError: ``learn`` isn't a bool.
    """

    def __init__(self, init: float = 0.5, adapt: bool = False, *, learn: bool = True) -> None:
        super().__init__(init=init, adapt=adapt)
        if not isinstance(learn, bool):
            raise TypeError(f'OwnWeights: learn must be True or False, got {learn!r}')
        self.learn = learn

    def _settings(self) -> str:
        return super()._settings() + ('' if self.learn else ', learn=False')


@FUSIONS.register_module()
class ChannelFusion(Fusion):
    r"""RL-v2: one pair of learnable scalars per output channel.

    .. math:: θ_{i,c} = a_c·θ_{p,c} + b_c·θ_{n,c}

    for every output channel c of every weight, and every head (last axis) of a position table. A vector (bias,
    norm, layer scale) has one number per channel already, so it gets one pair as a whole.

    ``coeff`` has shape ``(2, N)``: for a Bottleneck of width w :math:`2·6w` numbers and 2 per vector in place of
    :math:`17w^2`, for a ViT block of C channels :math:`2·9C` in place of :math:`12C^2`.

    Args:
        init, pretrained, adapt: see :class:`Fusion`.

    Source: "Replacement Learning: Training Neural Networks with Fewer Parameters", arXiv 2605.19533 ("learnable
    block"); the form is ours.
    """

    def groups(self, name: str, shape: Shape) -> int:
        kind = kind_of(name, shape)
        return 1 if kind == 'vector' else shape[0] if kind == 'weight' else shape[-1]


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
        init, pretrained, adapt: see :class:`Fusion`.

    Raises:
        TypeError: ``rank`` isn't an integer.
        ValueError: ``share`` outside of (0, 1], a negative ``rank``, or one larger than a weight's channels.

    Source: "Replacement Learning: Training Neural Networks with Fewer Parameters", arXiv 2605.19533 ("learnable
    block"); the form is ours.
    """

    def __init__(self, rank: int | None = None, share: float = 0.05, init: float = 0.5, pretrained: str = 'average',
                 adapt: bool = False) -> None:
        super().__init__(init, pretrained, adapt)
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
            raise TypeError(f'TransformFusion: rank must be an integer or None, got {rank!r}')
        if rank is not None and rank < 0:
            raise ValueError(f'TransformFusion: rank must be at least 0, got {rank}')
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f'TransformFusion: share must be above 0 and at most 1, got {share!r}')
        self.rank = rank
        self.share = share

    def check(self, shapes: dict[str, Shape]) -> None:
        self.rank_for(shapes)

    def rank_for(self, shapes: dict[str, Shape]) -> int:
        """The rank of the correction for a block whose tensors to make have ``shapes``."""
        weights = {name: shape for name, shape in shapes.items() if kind_of(name, shape) == 'weight'}
        if not weights:
            return 0
        limit, name = min((min(shape[0], math.prod(shape[1:])), name) for name, shape in weights.items())
        if self.rank is None:
            budget = self.share * sum(math.prod(shape) for shape in shapes.values()) - 2 * len(shapes)
            return max(0, min(limit, int(budget // (2 * sum(shape[0] for shape in weights.values())))))
        if self.rank > limit:
            raise ValueError(f'TransformFusion: rank={self.rank}, but {name} {shapes[name]} allows at most {limit}')
        return self.rank

    def fuse(self, parameters: dict[str, Tensor], pairs: dict[str, Pair],
             shapes: dict[str, Shape] | None = None) -> dict[str, Tensor]:
        shapes = shapes or {name: _shape(pair) for name, pair in pairs.items()}
        made, start = super().fuse(parameters, pairs, shapes), 0
        for name, shape in shapes.items() if 'up' in parameters else ():
            if kind_of(name, shape) == 'weight':
                up, down = (parameters[key][start:start + shape[0]] for key in ('up', 'down'))
                start += shape[0]
                if name in made:
                    made[name] = made[name] + (up @ (down.T @ made[name].flatten(1))).view(shape)
        return made

    def _start(self, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        start = super()._start(shapes)
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


def _mix(a: Tensor, b: Tensor, pair: Pair) -> Tensor:
    before, after = pair
    if before is None:
        return b * after
    if after is None:
        return a * before
    return a * before + b * after


def _shape(pair: Pair) -> Shape:
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
