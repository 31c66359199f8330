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

    Raises:
        ValueError: unknown mode.
    """
    MODES = ('detached', 'coupled')

    def __init__(self, mode: str = 'detached') -> None:
        if mode not in self.MODES:
            raise ValueError(f'unknown mode {mode!r}; allowed: {", ".join(self.MODES)}')
        self.mode = mode

    def run(self, layer: 'ComputingLayer', method: str, *args: Any, **kwargs: Any) -> Any:
        """The layer's ``method``, in general ``'forward'``, by plain autograd.

        Synthesise every tensor, then run the operator on them.
        """
        tensors = layer.synthesise(detach=self.mode == 'detached')
        return layer.operator(layer.template, tensors, method, *args, **kwargs)

    def __repr__(self) -> str:
        return f'Gradient(mode={self.mode!r})'


def build_gradient(cfg: Any) -> Gradient:
    """Build the ``replacement.gradient`` setting: a dict of :class:`Gradient` arguments, or None."""
    if isinstance(cfg, Gradient):
        return cfg
    if cfg is not None and not isinstance(cfg, Mapping):
        raise TypeError(f"replacement.gradient must be a dict such as dict(mode='detached'), got {cfg!r}")
    return build_with(Gradient, dict(cfg or {}), 'replacement.gradient')
