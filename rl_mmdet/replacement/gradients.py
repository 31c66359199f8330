"""Gradients: how a computing layer learns. The one place that decides what autograd sees of a replaced block."""
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .cheap_block import CheapBlock, Job, agrees
from .rebuild import rebuilt_input
from .registry import build_with

if TYPE_CHECKING:
    from .computing_layer import ComputingLayer

logger = logging.getLogger('rl_mmdet')


class Gradient:
    """How a computing layer's gradient is taken.

    Args:
        mode: ``'detached'``: the neighbours learn only from their own place, and only the fusion's parameters
            learn from the replaced block; ``'coupled'``: the neighbours also get gradient through it.
        memory: what a replaced block keeps for backward. None: what autograd keeps. ``'rebuild'``: the same inside,
            but its output, which the block after it would save, is made again from its input: for operators that
            are cheap and have no state (:class:`~.light_operators.LightOperator` without norms), and for what
            ``sample`` covers. ``'recompute'``: nothing but its input, and all is computed again in backward, by
            :func:`torch.utils.checkpoint.checkpoint`; for every operator, with the output rebuilt where that can be.
        sample: part of the rows of each convolution's output, above 0 and at most 1, from which the gradient of the
            fusion's parameters is estimated without bias; 1 is exact. None: plain autograd. It covers ``FullBlock``
            in the place of blocks of ordinary convolutions with BatchNorm in eval mode (``norm_eval=True``),
            detached; they then keep bands and bools instead of activations, and no synthesised weights
            (:mod:`~rl_mmdet.replacement.cheap_block`). Other blocks, and all while BatchNorm trains, take the plain
            path.

    Without ``sample`` the gradients are the same at every level. Under ``torch.compile`` outputs aren't rebuilt and
    nothing is sampled: its partitioner decides what is kept.

    Raises:
        ValueError: unknown mode or memory level, ``sample`` out of range, or with ``mode='coupled'``, whose neighbours
            need the gradient that sampling saves.
    """
    MODES = ('detached', 'coupled')
    MEMORY = (None, 'rebuild', 'recompute')

    def __init__(self, mode: str = 'detached', memory: str | None = None, sample: float | None = None) -> None:
        if mode not in self.MODES:
            raise ValueError(f'unknown mode {mode!r}; allowed: {", ".join(self.MODES)}')
        if memory not in self.MEMORY:
            raise ValueError(f'unknown memory {memory!r}; allowed: {", ".join(map(str, self.MEMORY))}')
        if sample is not None and (isinstance(sample, bool) or not isinstance(sample, (int, float))
                                   or not 0 < sample <= 1):
            raise ValueError(f'sample must be above 0 and at most 1, or None (plain autograd), got {sample!r}')
        if sample is not None and mode == 'coupled':
            raise ValueError("sample goes with mode='detached' only: with 'coupled' the neighbours need all gradients")
        self.mode = mode
        self.memory = memory
        self.sample = sample

    def run(self, layer: 'ComputingLayer', method: str, *args: Any, **kwargs: Any) -> Any:
        """The layer's ``method``, in general ``'forward'``: make the weights, then run the operator on them."""
        if self.sample is not None and method == 'forward' and self._is_cheap(layer):
            return self._run_cheap(layer, *args)
        weights = layer.weights(detach=self.mode == 'detached')
        return layer.operator(layer.template, weights, method, *args, **kwargs)

    def _is_cheap(self, layer: 'ComputingLayer') -> bool:
        """Whether the layer can take the cheap path now; its recipe is checked against the block itself once."""
        if layer.recipe is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if not layer.recipe.foldable(layer.template):
            return False
        if layer.recipe_agrees is None:
            with torch.no_grad():
                weights = layer.weights()
            layer.recipe_agrees = agrees(layer.recipe, layer.template, weights,
                                         lambda x: layer.operator(layer.template, weights, 'forward', x))
            if not layer.recipe_agrees:
                logger.warning('a %s doesn\'t compute what its modules suggest: its gradient isn\'t sampled',
                               type(layer.template).__name__)
        return layer.recipe_agrees

    def _run_cheap(self, layer: 'ComputingLayer', x: torch.Tensor) -> torch.Tensor:
        names, parameters = zip(*layer._parameters.items(), strict=True)

        def fold(values: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
            return layer.recipe.fold(layer.template, layer.synthesise(True, dict(zip(names, values, strict=True))))

        convs = [layer.template.get_submodule(name) for name in layer.recipe.convs]
        job = Job(fold, convs, max(1, round(1 / self.sample)), rebuild=layer.followed and self.memory == 'rebuild')
        job.keep_input = job.rebuild or rebuilt_input(x) is None
        watched = [tensor.detach() for tensor in (*layer.used_tensors(), *layer.template.buffers())]
        out = CheapBlock.apply(job, len(parameters), x, *parameters, *watched)
        layer.job = job if job.rebuild else None
        return out

    def __repr__(self) -> str:
        given = {key: value for key, value in vars(self).items() if value is not None}
        return f'Gradient({", ".join(f"{key}={value!r}" for key, value in given.items())})'


def build_gradient(cfg: Any) -> Gradient:
    """Build the ``replacement.gradient`` setting: a dict of :class:`Gradient` arguments, or None."""
    if isinstance(cfg, Gradient):
        return cfg
    if cfg is not None and not isinstance(cfg, Mapping):
        raise TypeError(f"replacement.gradient must be a dict such as dict(mode='detached'), got {cfg!r}")
    return build_with(Gradient, dict(cfg or {}), 'replacement.gradient')
