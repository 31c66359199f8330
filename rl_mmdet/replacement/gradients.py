"""Gradients: how a computing layer learns. The one place that decides what autograd sees of a replaced block."""
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .registry import build_with

if TYPE_CHECKING:
    from .computing_layer import ComputingLayer


class Gradient:
    """How a computing layer's gradient is taken.

    Args:
        mode: ``'detached'``: the neighbours learn only from their own place, and only the fusion's parameters
            learn from the replaced block; ``'coupled'``: the neighbours also get gradient through it.
        memory: what a replaced block keeps for backward. None: what autograd keeps. ``'rebuild'``: the same inside,
            but its output, which the block after it would save, is made again from its input: for operators that
            are cheap and have no state (:class:`~.light_operators.LightOperator` without norms). ``'recompute'``:
            nothing but its input, and all is computed again in backward, by :func:`torch.utils.checkpoint.checkpoint`;
            for every operator, and with the output rebuilt where that is possible.

    The gradients are the same at every level. Under ``torch.compile`` outputs aren't rebuilt: its partitioner decides
    what is kept.

    Raises:
        ValueError: unknown mode or memory level.
    """
    MODES = ('detached', 'coupled')
    MEMORY = (None, 'rebuild', 'recompute')

    def __init__(self, mode: str = 'detached', memory: str | None = None) -> None:
        if mode not in self.MODES:
            raise ValueError(f'unknown mode {mode!r}; allowed: {", ".join(self.MODES)}')
        if memory not in self.MEMORY:
            raise ValueError(f'unknown memory {memory!r}; allowed: {", ".join(map(str, self.MEMORY))}')
        self.mode = mode
        self.memory = memory

    def run(self, layer: 'ComputingLayer', method: str, *args: Any, **kwargs: Any) -> Any:
        """The layer's ``method``, in general ``'forward'``, by plain autograd.

        Make the weights, then run the operator on them.
        """
        weights = layer.weights(detach=self.mode == 'detached')
        return layer.operator(layer.template, weights, method, *args, **kwargs)

    def __repr__(self) -> str:
        return f'Gradient(mode={self.mode!r}' + (f', memory={self.memory!r})' if self.memory else ')')


def build_gradient(cfg: Any) -> Gradient:
    """Build the ``replacement.gradient`` setting: a dict of :class:`Gradient` arguments, or None."""
    if isinstance(cfg, Gradient):
        return cfg
    if cfg is not None and not isinstance(cfg, Mapping):
        raise TypeError(f"replacement.gradient must be a dict such as dict(mode='detached'), got {cfg!r}")
    return build_with(Gradient, dict(cfg or {}), 'replacement.gradient')
