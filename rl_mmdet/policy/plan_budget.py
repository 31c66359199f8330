"""What a choice of blocks may cost, as a part of the unreplaced model."""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..replacement import Chain
from ..replacement.chain import Place
from ..replacement.operators import FullBlock
from ..replacement.plans import Choice, add_
from ..replacement.saved_bytes import saved_bytes
from ..replacement.trial import forward_flops, replaced_twin
from .search_settings import is_number, is_pair, is_whole

QUANTITIES = dict(params='learnable parameters', flops='forward FLOPs', saved_bytes='bytes saved for backward')


class PlanBudget:
    """The most that may be left of a quantity of the model that is replaced in (the backbone).

    Args:
        budget: one of ``dict(params=0.7)``, learnable parameters; ``flops``, of one forward run in eval mode;
            ``saved_bytes``, what one forward run in training mode keeps for backward; above 0 and below 1.
        image_size: height and width of the one image that the last two are counted on, in pixels.

    Raises:
        ValueError: an unknown quantity, none or several, or a value out of range.
    """

    def __init__(self, budget: Mapping[str, float], image_size: Sequence[int]) -> None:
        if not isinstance(budget, Mapping) or len(budget) != 1 or not set(budget) <= set(QUANTITIES):
            raise ValueError(f'budget must be a dict with one of {", ".join(QUANTITIES)}, such as dict(params=0.7), '
                             f'got {budget!r}')
        [(self.quantity, self.part)] = budget.items()
        if not is_number(self.part) or not 0 < self.part < 1:
            raise ValueError(f'budget.{self.quantity} must be above 0 and below 1, a part of the unreplaced model\'s '
                             f'{self.name}, got {self.part!r}')
        if not is_pair(image_size) or not all(is_whole(size, 1) for size in image_size):
            raise ValueError(f'image_size must be (height, width) in pixels, two positive integers, got {image_size!r}')
        self.image_size = tuple(image_size)

    @property
    def name(self) -> str:
        return QUANTITIES[self.quantity]

    def measure(self, model: nn.Module) -> float:
        """The quantity of a model that is not being searched."""
        if self.quantity == 'flops':
            return forward_flops(model, self.image_size)
        if self.quantity == 'saved_bytes':
            return _saved_in_training(model, self.image_size)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def left_with(self, model: nn.Module, parts: Mapping[str, Any]) -> Callable[[Choice], float]:
        """What tells how much is left of it with a choice of blocks replaced by layers with these parts."""
        whole = self.measure(replaced_twin(model, {}, parts))
        return lambda choice: self.measure(replaced_twin(model, choice, parts)) / whole

    def savings(self, chains: Mapping[str, Chain], model: nn.Module, parts: Mapping[str, Any]) -> list[float]:
        """What replacing each block that can be replaced saves alone; negative where it costs more.

        Raises:
            ValueError: no choice reaches the budget, or the model can't run on the image.
        """
        places = [Place(chain, index) for chain in chains.values() for index in chain.replaceable()]
        left = self.left_with(model, parts)
        savings = [1 - left({chain.name: [index]}) for chain, index in places]
        most: Choice = {name: [] for name in chains}
        for (chain, index), saving in zip(places, savings, strict=True):
            if saving > 0:
                add_(most, chains, chain.name, index)
        lowest = left(most)
        if lowest > self.part:
            raise ValueError(f'the budget can\'t be reached: with {sum(map(len, most.values()))} blocks replaced, all '
                             f'that save something, {lowest:.3f} of the unreplaced model\'s {self.name} are left'
                             f'{self._hint(parts)}')
        return savings

    def _hint(self, parts: Mapping[str, Any]) -> str:
        if self.quantity == 'flops' and isinstance(parts['operator'], FullBlock):
            return '; FullBlock computes all that the removed block did: take a light operator'
        if self.quantity == 'saved_bytes' and parts['gradient'].sample is None:
            return '; plain autograd keeps the weights that are made: add gradient=dict(sample=0.125)'
        return ''

    def __str__(self) -> str:
        return f'budget=dict({self.quantity}={self.part})'


def _saved_in_training(model: nn.Module, image_size: Sequence[int]) -> int:
    """Bytes that one forward run on 1×3×image_size keeps for backward."""
    model.train()  # mmdet's backbones return None here
    like = next(model.parameters())
    image = torch.zeros(1, 3, *image_size, device=like.device, dtype=like.dtype)
    try:
        return saved_bytes(model, lambda: model(image))
    except Exception as error:  # a model raises whatever it likes
        raise ValueError(f'{type(model).__name__} can\'t train on a 1x3x{image_size[0]}x{image_size[1]} image, on '
                         f'which saved bytes are counted ({type(error).__name__}: {error}); set another '
                         'image_size=(height, width)') from error
