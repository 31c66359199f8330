"""BestFit: a plan that replaces the blocks which their neighbours explain best, by what comes out of them."""
import logging
import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..block_structure import copy_around_parameters
from ..chain import Chain, Choice, Place
from ..checks import check_number
from ..computing_layer import LayerSettings
from ..registry import PLANS
from ..start.fit_outputs import Use, after_each, fit_layers_, make_ready_to_fit_
from ..start.starts import Average, FitOutputs
from .plan import Plan, add_

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
        p: above 0, at most 1, of all blocks that can be replaced; rounded, but at least one.
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
        self.p = check_number('BestFit: p', p, above=0, most=1,
                              hint='0.25 replaces a quarter of the blocks that can be replaced')
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

    def choose(self, chains: Mapping[str, Chain], model: nn.Module | None = None,
               settings: LayerSettings | None = None) -> Choice:
        if model is None or settings is None:
            raise ValueError('BestFit: it runs the model, so it needs one; use it as the plan of replace_blocks_()')
        places = [Place(chain, index) for chain in chains.values() for index in chain.replaceable()]
        self.errors = self._measure(model, places, settings._replace(start=Average()))  # this plan has a fit of its own
        count = max(1, math.floor(self.p * len(places) + 0.5))
        choice: Choice = {name: [] for name in chains}
        for chain, index in sorted(places, key=lambda place: self.errors[place.name]):
            if sum(map(len, choice.values())) < count:
                add_(choice, chains, chain.name, index)
        logger.info('BestFit, output errors: %s', self._errors())
        return choice

    def _measure(self, model: nn.Module, places: Sequence[Place], settings: LayerSettings) -> dict[str, float]:
        """The error of each block, all of them fitted in the same runs over the batches."""
        layers = {place.name: self._tried(model, {place.chain.name: [place.index]}, settings).get_submodule(place.name)
                  for place in places}
        for layer in layers.values():
            make_ready_to_fit_(layer)
        whole = copy_around_parameters(model)
        whole.eval()
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
