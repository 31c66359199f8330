"""Gradients: how a computing layer learns. The one place that decides what autograd sees of a replaced block."""
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .folded_block import FoldedBlock
from .normed_block import NormedBlock
from .rebuild import rebuilt_input
from .recipe import Job, agrees
from .registry import build_with
from .sampled_layers import Again, Run, SampledLayers, Synthesis

if TYPE_CHECKING:
    from .computing_layer import ComputingLayer

logger = logging.getLogger('rl_mmdet')


class Gradient:
    """How a computing layer's gradient is taken.

    Args:
        mode: ``'detached'``: the neighbours learn only from their own place, and only the fusion's parameters
            learn from the replaced block; ``'coupled'``: the neighbours also get gradient through it.
        memory: what a replaced block keeps for backward. None: with ``sample`` as ``'masks'``, else what autograd
            keeps. ``'masks'``: the cheapest in time; bools and parts of the inputs instead of activations, and no
            synthesised weights. ``'rebuild'``: its output, which the block after it would save, isn't kept either but
            made again from its input, at the price of one cheap layer's computation: for operators that have no
            state (:class:`~.light_operators.LightOperator` without norms), and with ``sample`` for blocks with a
            recipe. ``'recompute'``: nothing but its input, and all is computed again in backward: the least memory,
            for one more forward; for every operator, with the output rebuilt where that can be. With ``sample`` blocks
            with a recipe do this themselves, others by :func:`torch.utils.checkpoint.checkpoint`, under which running
            statistics are updated twice.
        sample: part of each layer's positions, above 0 and at most 1, from which the gradient of the fusion's
            parameters is estimated without bias (:mod:`~rl_mmdet.replacement.sampling`); 1 is exact. Other values
            are rounded to 1 over an integer. None: plain autograd. Needs ``mode='detached'``.

    With ``sample`` each block takes the best way there is for it, see ``tools/blocks.py``. Blocks of ordinary
    convolutions in a row, each with its norm and a ReLU, as a whole: with BatchNorm in eval mode by
    :mod:`~rl_mmdet.replacement.folded_block`, with BatchNorm that trains or GroupNorm by
    :mod:`~rl_mmdet.replacement.normed_block`. All others, Swin's and ViT's for instance, layer by layer
    (:mod:`~rl_mmdet.replacement.sampled_layers`), and so do the first ones while SyncBatchNorm trains.

    Without ``sample`` the gradients are the same at every level. Under ``torch.compile`` outputs aren't rebuilt and
    nothing is sampled: its partitioner decides what is kept.

    Raises:
        ValueError: unknown mode or memory level, ``sample`` out of range, or with ``mode='coupled'``, whose neighbours
            need the gradient that sampling saves; ``memory='masks'`` without ``sample``.
    """
    MODES = ('detached', 'coupled')
    MEMORY = (None, 'masks', 'rebuild', 'recompute')

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
        if memory == 'masks' and sample is None:
            raise ValueError("memory='masks' needs sample, for instance sample=0.125; sample=1 is exact")
        self.mode = mode
        self.memory = memory
        self.sample = sample

    def run(self, layer: 'ComputingLayer', method: str, *args: Any, **kwargs: Any) -> Any:
        """The layer's ``method``, in general ``'forward'``: make the weights, then run the operator on them."""
        if self._samples():
            self._warn_of_few_rows(layer, *args)
            function = self._function_for(layer, method)
            if function is not None and len(args) == 1 and not kwargs:
                return self._run_block(layer, function, *args)
            if layer.template_has_weights:
                return self._run_layers(layer, method, *args, **kwargs)
        weights = layer.weights(detach=self.mode == 'detached')
        return layer.operator(layer.template, weights, method, *args, **kwargs)

    def recomputes(self, layer: 'ComputingLayer', method: str) -> bool:
        """Whether memory is saved by what runs the block as a whole, without an activation checkpoint around it."""
        return self.memory == 'recompute' and self._function_for(layer, method) is not None

    @property
    def parts(self) -> int:
        """K, how many parts a layer's positions have."""
        return max(1, round(1 / self.sample))

    def _samples(self) -> bool:
        return self.sample is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _function_for(self, layer: 'ComputingLayer', method: str) -> type[FoldedBlock] | type[NormedBlock] | None:
        """What can run the block as a whole now, if anything; its recipe is checked against the block itself once."""
        if layer.recipe is None or method != 'forward' or not self._samples():
            return None
        if not layer.recipe.local(layer.template):
            return None
        if layer.recipe_agrees is None:
            with torch.no_grad():
                weights = layer.weights()
            layer.recipe_agrees = agrees(layer.recipe, layer.template, weights,
                                         lambda x: layer.operator(layer.template, weights, 'forward', x))
            if not layer.recipe_agrees:
                logger.warning('a %s doesn\'t compute what its modules suggest: its gradient is sampled layer by layer',
                               type(layer.template).__name__)
        if not layer.recipe_agrees:
            return None
        return FoldedBlock if layer.recipe.foldable(layer.template) else NormedBlock

    def _run_block(self, layer: 'ComputingLayer', function: type[torch.autograd.Function],
                   x: torch.Tensor) -> torch.Tensor:
        names, parameters = zip(*layer._parameters.items(), strict=True)

        def weights(values: Sequence[torch.Tensor], wanted: Collection[str]) -> dict[str, torch.Tensor]:
            return layer.synthesise(True, dict(zip(names, values, strict=True)), wanted)

        memory = self.memory if layer.followed or self.memory == 'recompute' else 'masks'
        job = Job(weights, layer.recipe, layer.template, self.parts, memory or 'masks')
        job.keep_input = memory == 'rebuild' or rebuilt_input(x) is None
        statistics = layer.recipe.fixed_statistics(layer.template)
        watched = [tensor.detach() for tensor in (*layer.used_tensors(), *statistics)]
        out = function.apply(job, len(parameters), x, *parameters, *watched)
        if layer.followed and memory in ('rebuild', 'recompute'):
            layer.again = lambda inputs: function.output_again(job, inputs, list(parameters))
        return out

    def _run_layers(self, layer: 'ComputingLayer', method: str, *args: Any, **kwargs: Any) -> Any:
        keys, parameters = zip(*layer._parameters.items(), strict=True)

        def make(values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
            return layer.weights(True, dict(zip(keys, values, strict=True)))

        def make_again() -> dict[str, torch.Tensor]:
            with torch.no_grad():
                return make(parameters)

        watched = [tensor.detach() for tensor in layer.used_tensors()]
        run = Run(make, self.parts)
        made = Synthesis.apply(run, len(parameters), *parameters, *watched)
        weights = dict(zip(run.names, made, strict=True))
        with SampledLayers(run, weights, Again(make_again)):
            return layer.operator(layer.template, weights, method, *args, **kwargs)

    def _warn_of_few_rows(self, layer: 'ComputingLayer', *args: Any) -> None:
        rows = args[0].shape[-2] if args and layer.has_rows and args[0].ndim == 4 else self.parts
        if rows < self.parts and not layer.warned:
            layer.warned = True
            logger.warning('sample=%s asks for %d parts of the rows, but a %s sees a map of %d: each is a part there',
                           self.sample, self.parts, type(layer.template).__name__, rows)

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
