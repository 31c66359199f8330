"""How much of a quantity of the unreplaced model may be left when blocks are replaced."""
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..replacement import set_step_
from ..replacement.chain import Chain, Choice, Place
from ..replacement.checks import check_number, is_whole
from ..replacement.computing_layer import LayerSettings
from ..replacement.operators import FullBlock
from ..replacement.plans.plan import add_
from ..replacement.plans.trial import forward_flops, replaced_twin
from ..replacement.saved_bytes import saved_bytes
from .schedule import is_pair

QUANTITIES = dict(params='learnable parameters', flops='forward FLOPs', saved_bytes='bytes saved for backward')


class ShareLimit:
    """The largest share of a quantity of the model (the backbone) that may be left.

    Args:
        budget: one of ``dict(params=0.7)``, learnable parameters; ``flops``, of one forward run in eval mode;
            ``saved_bytes``, what one forward run in training mode keeps for backward; above 0 and below 1.
        image_size: height and width of the one image that the last two are counted on, in pixels.

    Attributes:
        quantity, share: key and value of ``budget``.

    Raises:
        ValueError: an unknown quantity, none or several, or a value out of range.
    """

    def __init__(self, budget: Mapping[str, float], image_size: Sequence[int]) -> None:
        if not isinstance(budget, Mapping) or len(budget) != 1 or not set(budget) <= set(QUANTITIES):
            raise ValueError(f'budget must be a dict with one of {", ".join(QUANTITIES)}, such as dict(params=0.7), '
                             f'got {budget!r}')
        [(self.quantity, self.share)] = budget.items()
        check_number(f'budget.{self.quantity}', self.share, above=0, below=1,
                     hint=f'a share of the unreplaced model\'s {self.name}')
        if not is_pair(image_size) or not all(is_whole(size, 1) for size in image_size):
            raise ValueError(f'image_size must be (height, width) in pixels, two positive integers, got {image_size!r}')
        self.image_size = tuple(image_size)

    @property
    def name(self) -> str:
        """The quantity in words."""
        return QUANTITIES[self.quantity]

    def measure(self, model: nn.Module) -> float:
        """The quantity of a model that is not being searched."""
        if self.quantity == 'flops':
            return forward_flops(model, self.image_size)
        if self.quantity == 'saved_bytes':
            return _saved_in_training(model, self.image_size)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def left_with(self, model: nn.Module, settings: LayerSettings) -> Callable[[Choice], float]:
        """A function that tells which share is left with some blocks of ``model`` replaced by such layers."""
        whole = self.measure(replaced_twin(model, {}, settings))
        return lambda choice: self.measure(replaced_twin(model, choice, settings)) / whole

    def savings(self, chains: Mapping[str, Chain], model: nn.Module, settings: LayerSettings) -> dict[Place, float]:
        """Which share each block saves if it alone is replaced; only blocks that save something.

        Raises:
            ValueError: too much is left with all of them replaced, or the model can't run on the image.
        """
        places = [Place(chain, index) for chain in chains.values() for index in chain.replaceable()]
        left = self.left_with(model, settings)
        alone = {place: 1 - left({place.chain.name: [place.index]}) for place in places}
        savings = {place: saving for place, saving in alone.items() if saving > 0}
        most: Choice = {name: [] for name in chains}
        for chain, index in savings:
            add_(most, chains, chain.name, index)
        lowest = left(most)
        if lowest > self.share:
            raise ValueError(f'the budget can\'t be reached: with {sum(map(len, most.values()))} blocks replaced, all '
                             f'that save something, {lowest:.3f} of the unreplaced model\'s {self.name} are left'
                             f'{self._hint(settings)}')
        return savings

    def _hint(self, settings: LayerSettings) -> str:
        """What else saves this quantity, to be appended to a message; may be empty."""
        if self.quantity == 'flops' and isinstance(settings.operator, FullBlock):
            return '; FullBlock computes all that the removed block did: take a light operator'
        if self.quantity == 'saved_bytes' and not settings.gradient.recompute:
            return '; the weights that are made are kept, too: set gradient=dict(recompute=True), or a light operator'
        return ''

    def __str__(self) -> str:
        return f'budget=dict({self.quantity}={self.share})'


def _saved_in_training(model: nn.Module, image_size: Sequence[int]) -> int:
    """Bytes that one forward run on 1×3×image_size keeps for backward."""
    model.train()  # mmdet's backbones return None here
    set_step_(model, 0)
    like = next(model.parameters())
    image = torch.zeros(1, 3, *image_size, device=like.device, dtype=like.dtype)
    try:
        return saved_bytes(model, lambda: model(image))
    except Exception as error:  # a model raises whatever it likes
        raise ValueError(f'{type(model).__name__} can\'t train on a 1x3x{image_size[0]}x{image_size[1]} image, on '
                         f'which saved bytes are counted ({type(error).__name__}: {error}); set another '
                         'image_size=(height, width)') from error
