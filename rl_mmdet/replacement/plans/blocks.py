"""Replace the blocks that are named."""
from collections.abc import Mapping, Sequence

from torch import nn

from ..chain import Chain, Choice, describe_replaceable
from ..computing_layer import LayerSettings
from ..registry import PLANS
from .plan import Plan


@PLANS.register_module()
class Blocks(Plan):
    """Replace exactly the blocks that are named.

    Args:
        blocks: block indices by chain name, e.g. ``{'layer3': [1, 3]}``. Neighbouring blocks may both be named:
            each then takes the nearest *kept* blocks around it.

    Raises:
        TypeError: not a dict of lists of integers.
        ValueError: nothing is named, or a block is named twice; when chosen: an unknown stage or index.
    """

    def __init__(self, blocks: Mapping[str, Sequence[int]]) -> None:
        if not isinstance(blocks, Mapping):
            raise TypeError(f"Blocks: blocks must be a dict such as {{'layer3': [1, 3]}}, got {blocks!r}")
        for name, indices in blocks.items():
            if isinstance(indices, str) or not isinstance(indices, Sequence) \
                    or not all(type(index) is int for index in indices):
                raise TypeError(f'Blocks: {name!r} must map to a list of block indices, got {indices!r}')
            if len(set(indices)) != len(indices):
                raise ValueError(f'Blocks: {name!r} names a block twice: {list(indices)}')
        if not any(blocks.values()):
            raise ValueError('Blocks: no block is named; leave `replacement` out to train the unmodified backbone')
        self.blocks = {name: sorted(indices) for name, indices in blocks.items()}

    def choose(self, chains: Mapping[str, Chain], model: nn.Module | None = None,
               settings: LayerSettings | None = None) -> Choice:
        for name, indices in self.blocks.items():
            if name not in chains:
                raise ValueError(f'Blocks: there is no stage {name!r}; {describe_replaceable(chains)}')
            for index in indices:
                if not 0 <= index < len(chains[name]):
                    raise ValueError(f'Blocks: {name} has no block {index}, its blocks are 0 to '
                                     f'{len(chains[name]) - 1}; {describe_replaceable(chains)}')
        return {name: list(self.blocks.get(name, [])) for name in chains}

    def _arguments(self) -> str:
        return f'{self.blocks}'
