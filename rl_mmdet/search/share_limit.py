"""How much of a quantity of the unreplaced model may be left when blocks are replaced."""
from collections.abc import Mapping, Sequence

from torch import nn

from ..replacement.chain import Chain, Choice, Place
from ..replacement.checks import check_number, is_whole
from ..replacement.computing_layer import LayerSettings
from ..replacement.operators import FullBlock
from ..replacement.plans.plan import add_
from ..replacement.plans.trial import forward_flops, replaced_twin

QUANTITIES = dict(params='learnable parameters', flops='forward FLOPs')


class ShareLimit:
    """The largest share of a quantity of the model (the backbone) that may be left.

    Args:
        budget: ``dict(params=0.7)``, learnable parameters, or ``dict(flops=0.7)``, of one forward run in eval mode;
            above 0 and below 1.
        image_size: height and width of the image that FLOPs are counted on, in pixels.

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
        pair = isinstance(image_size, Sequence) and not isinstance(image_size, str) and len(image_size) == 2
        if not pair or not all(is_whole(size, 1) for size in image_size):
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
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def savings(self, chains: Mapping[str, Chain], model: nn.Module, settings: LayerSettings) -> dict[Place, float]:
        """Which share each block saves if it alone is replaced; only blocks that save something.

        Raises:
            ValueError: too much is left with all of them replaced, or the model can't run on the image.
        """
        places = [Place(chain, index) for chain in chains.values() for index in chain.replaceable()]
        whole = self.measure(replaced_twin(model, {}, settings))

        def left(choice: Choice) -> float:
            """The share that is left with these blocks replaced."""
            return self.measure(replaced_twin(model, choice, settings)) / whole

        alone = {place: 1 - left({place.chain.name: [place.index]}) for place in places}
        savings = {place: saving for place, saving in alone.items() if saving > 0}
        most: Choice = {name: [] for name in chains}
        for chain, index in savings:
            add_(most, chains, chain.name, index)
        lowest = left(most)
        if lowest > self.share:
            hint = ''
            if self.quantity == 'flops' and isinstance(settings.operator, FullBlock):
                hint = '; FullBlock computes all that the removed block did: take a light operator'
            raise ValueError(f'the budget can\'t be reached: with {sum(map(len, most.values()))} blocks replaced, all '
                             f'that save something, {lowest:.3f} of the unreplaced model\'s {self.name} are left'
                             f'{hint}')
        return savings

    def __str__(self) -> str:
        return f'budget=dict({self.quantity}={self.share})'
