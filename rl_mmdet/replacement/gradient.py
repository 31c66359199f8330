"""How a replaced block learns: in which steps, with or without its neighbours, and what it keeps for backward."""
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from .checks import check_number
from .registry import call_checked


class Gradient:
    r"""How a computing layer's gradient is taken.

    In one of k = ``every`` steps the made weights carry gradient to the layer's own parameters φ, multiplied by k; in
    the others they are constants, so that no weight gradient is computed and nothing is kept for one:

    .. math:: g = k\,m\,\frac{∂L}{∂φ}, \qquad m = 1 \text{ in one of } k \text{ steps, else } 0

    :func:`~rl_mmdet.replacement.set_step_` counts the steps, as ``LearningStepsHook`` does in MMEngine's training: the
    blocks take turns, so that all steps cost alike. Where nobody counts, they learn in every step, as with k = 1.

    In the steps between, the parameters get a gradient of zeros, as DDP needs. SGD then makes the same steps on
    average, with momentum and weight decay as ever. Adam's second moment is k times as large, so its steps are shorter,
    at most by :math:`\sqrt k`.

    Args:
        mode: ``'detached'``: only the layer's own parameters learn from the replaced block, its neighbours only from
            their own places; ``'coupled'``: the neighbours also get gradient through it.
        every: k, at least 1; 1 is plain autograd. None is 8 for ``'detached'``, and 1 for ``'coupled'``, where no other
            value is allowed: the neighbours' weights would learn by leaps.
        recompute: keep less for backward and compute it again there. The layer keeps its input alone
            (:func:`torch.utils.checkpoint.checkpoint`); of an operator without state, the block after it doesn't keep
            its output either (:mod:`~rl_mmdet.replacement.rebuild`). None: for operators whose second forward run costs
            next to nothing, as the light ones' does.

    Raises:
        TypeError: ``recompute`` is neither a bool nor None.
        ValueError: unknown ``mode``; ``every`` below 1, or above 1 with ``'coupled'``.
    """
    MODES = ('detached', 'coupled')

    def __init__(self, mode: str = 'detached', every: int | None = None, recompute: bool | None = None) -> None:
        if mode not in self.MODES:
            raise ValueError(f'unknown mode {mode!r}; allowed: {", ".join(self.MODES)}')
        if recompute is not None and not isinstance(recompute, bool):
            raise TypeError(f'recompute must be True, False or None, got {recompute!r}')
        if every is None:
            every = 8 if mode == 'detached' else 1
        self.mode = mode
        self.every = check_number('every', every, whole=True, least=1)
        self.recompute = recompute
        if mode == 'coupled' and every > 1:
            raise ValueError(f"every={every} goes with mode='detached' only: with 'coupled' the neighbours learn from "
                             'the replaced block in every step; leave every out')

    def factor(self, turn: bool | None) -> int:
        """By what the gradient is multiplied in this forward run; 0 if the made weights are constants.

        Args:
            turn: whether it is the block's turn; None if nobody counts.
        """
        if turn is None or not torch.is_grad_enabled():
            return 1
        return self.every if turn else 0

    def __repr__(self) -> str:
        settings = f'mode={self.mode!r}, every={self.every}'
        return f'Gradient({settings}' + ('' if self.recompute is None else f', recompute={self.recompute}') + ')'


def build_gradient(cfg: Any) -> Gradient:
    """Build the setting ``replacement.gradient``: a dict of :class:`Gradient`'s arguments, or None."""
    if isinstance(cfg, Gradient):
        return cfg
    if cfg is not None and not isinstance(cfg, Mapping):
        raise TypeError(f"replacement.gradient must be a dict such as dict(mode='detached'), got {cfg!r}")
    return call_checked(Gradient, dict(cfg or {}), 'replacement.gradient')


def scaled_gradients(parameters: Mapping[str, Tensor], factor: int) -> dict[str, Tensor]:
    """The parameters' values, with gradients that are ``factor`` times as large."""
    if factor == 1 or not torch.is_grad_enabled():
        return dict(parameters)
    return {name: _ScaledGradient.apply(parameter, factor) for name, parameter in parameters.items()}


def with_zero_gradients(out: Any, parameters: Iterable[Tensor]) -> Any:
    """``out``, a tensor or several in tuples and lists, in which the parameters take part with gradients of zeros."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    if not learning or not torch.is_grad_enabled():
        return out
    if isinstance(out, Tensor):
        return _WithZeroGradients.apply(out, *learning)
    parts, structure = tree_flatten(out)
    first = next((i for i, part in enumerate(parts) if isinstance(part, Tensor) and part.is_floating_point()), None)
    if first is None:
        return out
    parts[first] = _WithZeroGradients.apply(parts[first], *learning)
    return tree_unflatten(parts, structure)


class _ScaledGradient(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _WithZeroGradients(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.likes = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.likes)
