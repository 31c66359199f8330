"""BestFit: a plan that replaces the blocks which their neighbours explain best, by what comes out of them."""
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..chain import Chain, Choice
from ..checks import check_number
from ..computing_layer import ComputingLayer, LayerSettings
from ..registry import PLANS
from ..start.checkpoint import adapt_state_dict
from ..start.norms import recalibrate_norms_
from .fraction import OF_ALL, count_of
from .plan import Plan, add_
from .trial import replaced_twin

logger = logging.getLogger('rl_mmdet')


@PLANS.register_module()
class BestFit(Plan):
    r"""Replace the fraction p of the blocks whose outputs their neighbours reproduce best on calibration batches.

    .. math:: e = \frac{\lVert C(h) - B(h) \rVert}{\lVert B(h) - h \rVert}

    over all batches, for a block B of the trained model, its input h there, and the computing layer C that would stand
    in its place if it alone were replaced: the fusion fitted to B's weights as when a baseline is loaded, the
    statistics of its norms from the same batches. 0 reproduces the block, 1 is what leaving it out would give. Where B
    changes the shape, the denominator is :math:`\lVert B(h) \rVert`. The blocks of smallest e are chosen one after
    the other, as long as the choice stays valid.

    Args:
        p: above 0, at most 1; of how many blocks see :class:`~rl_mmdet.replacement.Fraction`.
        batches: inputs that the model takes, in the form and range it was trained on; brought to its device.

    Attributes:
        errors: e by qualified block name, after the choice.

    Raises:
        TypeError: ``batches`` isn't a list or tuple of tensors.
        ValueError: ``p`` out of range, or no batch; when chosen: an e can't be computed, because the block never runs,
            does nothing or gives numbers that aren't finite, as it does with weights that aren't trained.
    """

    def __init__(self, p: float, batches: Sequence[Tensor] | None = None) -> None:
        self.p = check_number('BestFit: p', p, above=0, most=1, hint=OF_ALL)
        if batches is None:
            raise ValueError('BestFit: it needs a trained model and calibration batches, which a config can\'t hold; '
                             f'run python tools/choose_blocks.py CONFIG CHECKPOINT --p {p} and paste the plan that it '
                             "prints, dict(type='Blocks', blocks={...}), into the config")
        if not isinstance(batches, (list, tuple)) or not all(isinstance(batch, Tensor) for batch in batches):
            raise TypeError('BestFit: batches must be a list of tensors that the model takes, got '
                            f'{type(batches).__name__}')
        if not batches:
            raise ValueError('BestFit: batches is empty; it needs at least one')
        self.batches = batches
        self.errors: dict[str, float] = {}

    def _choose(self, chains: Mapping[str, Chain], model: nn.Module | None, settings: LayerSettings | None) -> Choice:
        if model is None:
            raise ValueError('BestFit: it runs the model, so it needs one; use it as the plan of replace_blocks_()')
        candidates = {name: chain.replaceable() for name, chain in chains.items()}
        places = {chains[name].block_name(index): (name, index)
                  for name, indices in candidates.items() for index in indices}
        self.errors = self._measure(model, places, settings)
        choice: Choice = {name: [] for name in chains}
        for block in sorted(places, key=self.errors.get):
            if sum(map(len, choice.values())) < count_of(self.p, candidates):
                add_(choice, chains, *places[block])
        logger.info('BestFit, output errors: %s', self._errors())
        return choice

    @torch.no_grad()
    def _measure(self, model: nn.Module, places: Mapping[str, tuple[str, int]],
                 settings: LayerSettings | None) -> dict[str, float]:
        """The error of each block, all of them in one run over the batches after one that recalibrates the norms."""
        layers = {block: _layer_at(model, block, {chain: [index]}, settings)
                  for block, (chain, index) in places.items()}
        whole = replaced_twin(model, {}, settings)
        device = next(model.parameters()).device
        sums = {block: [0., 0.] for block in layers}

        def run(batch: Tensor) -> None:
            whole(batch.to(device))

        with _beside_blocks(whole, layers, lambda *_: None):
            recalibrate_norms_(nn.ModuleList(layers.values()), self.batches, run)
        with _beside_blocks(whole, layers, lambda block, *values: _add_squares_(sums[block], *values)):
            for batch in self.batches:
                run(batch)
        return {block: _error(block, *squares) for block, squares in sums.items()}

    def _errors(self) -> str:
        return ', '.join(f'{block} {error:.3f}' for block, error in self.errors.items())

    def _arguments(self) -> str:
        return f'p={self.p}, batches={len(self.batches)}' + (f', errors: {self._errors()}' if self.errors else '')


def _layer_at(model: nn.Module, block: str, choice: Choice, settings: LayerSettings | None) -> ComputingLayer:
    """The computing layer in the place of ``block``, started from the model's own weights as a checkpoint's."""
    twin = replaced_twin(model, choice, settings)
    adapted, _ = adapt_state_dict(twin, model.state_dict())
    layer = twin.get_submodule(block)
    layer.load_state_dict({key: adapted[f'{block}.{key}'] for key in layer.state_dict()})
    return layer


@contextmanager
def _beside_blocks(model: nn.Module, layers: Mapping[str, ComputingLayer], receive: Any) -> Iterator[None]:
    """While the model runs, run each layer on the inputs of the block it would replace.

    Args:
        model: has the blocks.
        layers: by the block's name.
        receive: gets the name, the block's inputs, its output and the layer's.
    """
    def hook_for(block: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            receive(block, (args, tuple(kwargs.values())), output, layers[block](*args, **kwargs))
        return hook

    hooks = [model.get_submodule(block).register_forward_hook(hook_for(block), with_kwargs=True) for block in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add_squares_(sums: list[float], inputs: Any, output: Any, made: Any) -> None:
    """Add the squared norms of C(h) - B(h) and of B(h) - h."""
    for before, wanted, given in zip(_tensors(inputs), _tensors(output), _tensors(made), strict=False):
        sums[0] += _square(given - wanted)
        sums[1] += _square(wanted - before if before.shape == wanted.shape else wanted)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _square(tensor: Tensor) -> float:
    return tensor.float().square().sum().item()


def _error(block: str, difference: float, change: float) -> float:
    if change == 0:
        raise ValueError(f'BestFit: {block} never runs or changes nothing, so there is nothing to compare with; are '
                         'the model\'s weights trained ones?')
    error = math.sqrt(difference / change)
    if not math.isfinite(error):
        raise ValueError(f'BestFit: the output error of {block} is {error}; are the model\'s weights trained ones, and '
                         'the batches finite?')
    return error
