"""BestFit: a plan that replaces the blocks which their neighbours explain best, by what comes out of them."""
import logging
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..chain import Chain, Choice
from ..checks import check_number
from ..computing_layer import ComputingLayer, LayerSettings
from ..registry import PLANS
from ..start.checkpoint import adapt_state_dict
from ..start.fit_outputs import Use, after_each, fit_layers_, make_ready_to_fit_
from ..start.starts import FitOutputs
from .fraction import OF_ALL, count_of
from .plan import Plan, add_
from .trial import replaced_twin

logger = logging.getLogger('rl_mmdet')


@PLANS.register_module()
class BestFit(Plan):
    r"""Replace the fraction p of the blocks whose outputs their neighbours reproduce best on calibration batches.

    .. math:: e = \frac{\lVert C(h) - B(h) \rVert}{\lVert B(h) - h \rVert}

    over all batches, for a block B of the trained model, its input h there, and the computing layer C that would stand
    in its place if it alone were replaced, after it has been fitted to B's outputs as with
    ``start=dict(type='FitOutputs')``, the statistics of its norms from the same batches. 0 reproduces the block, 1 is
    what leaving it out would give. Where B changes the shape, the denominator is :math:`\lVert B(h) \rVert`. The
    blocks of smallest e are chosen one after the other, as long as the choice stays valid.

    Args:
        p: above 0, at most 1; of how many blocks see :class:`~rl_mmdet.replacement.Fraction`.
        batches: inputs that the model takes, in the form and range it was trained on; brought to its device.
        steps: of the fit, each with one of the batches; 0 measures the start.

    Attributes:
        errors: e by qualified block name, after the choice.

    Raises:
        TypeError: ``batches`` isn't a list or tuple of tensors.
        ValueError: ``p`` or ``steps`` out of range, or no batch; when chosen: an e can't be computed, because the block
            never runs, does nothing or gives numbers that aren't finite, as it does with weights that aren't trained.
    """

    def __init__(self, p: float, batches: Sequence[Tensor] | None = None, steps: int = 100) -> None:
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
        self.steps = check_number('BestFit: steps', steps, whole=True, least=0)
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

    def _measure(self, model: nn.Module, places: Mapping[str, tuple[str, int]],
                 settings: LayerSettings | None) -> dict[str, float]:
        """The error of each block, all of them fitted in the same runs over the batches."""
        layers = {block: _layer_at(model, block, {chain: [index]}, settings)
                  for block, (chain, index) in places.items()}
        whole = replaced_twin(model, {}, settings)
        blocks = {block: whole.get_submodule(block) for block in layers}
        device = next(model.parameters()).device

        def receive(batch: Tensor, use: Use) -> None:
            with after_each(blocks, lambda block, inputs, out: use(block, layers[block], inputs, inputs, out)):
                whole(batch.to(device))

        try:
            found = fit_layers_(layers, self.batches, self.steps, FitOutputs().lr, receive)
        except ValueError as error:
            raise ValueError(f'BestFit: {error}') from None
        return {block: errors.after for block, errors in found.items()}

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
    make_ready_to_fit_(layer)
    return layer
