"""Plans: where; which blocks of which chains are replaced."""
from collections.abc import Mapping, Sequence

from .chain import Chain
from .registry import PLANS

Choice = dict[str, list[int]]
"""Block indices to replace, by chain name."""


@PLANS.register_module()
class EveryKth:
    r"""In every chain, replace the blocks :math:`i` with :math:`i \bmod k = o` that can be replaced.

    Blocks count from 0, the first block of a stage. Chains that are frozen, and blocks that have no kept
    neighbours or no tensors of their shapes (first and last of a stage), are left alone.

    Args:
        k: distance between replaced blocks, at least 2.
        offset: :math:`o`, from 0 to ``k - 1``.

    Raises:
        ValueError: ``k`` or ``offset`` out of range.
    """

    def __init__(self, k: int, offset: int = 1) -> None:
        if not _is_index(k) or k < 2:
            raise ValueError(f'EveryKth: k must be an integer of at least 2, got {k!r} '
                             '(k=2 replaces every other block, k=4 every fourth)')
        if not _is_index(offset) or not 0 <= offset < k:
            raise ValueError(f'EveryKth: offset must be an integer from 0 to k - 1 = {k - 1}, got {offset!r}')
        self.k = k
        self.offset = offset

    def choose(self, chains: Mapping[str, Chain]) -> Choice:
        return {name: [i for i in chain.replaceable() if i % self.k == self.offset]
                for name, chain in chains.items()}

    def __repr__(self) -> str:
        return f'EveryKth(k={self.k}, offset={self.offset})'


@PLANS.register_module()
class Blocks:
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
            if isinstance(indices, str) or not isinstance(indices, Sequence) or not all(map(_is_index, indices)):
                raise TypeError(f'Blocks: {name!r} must map to a list of block indices, got {indices!r}')
            if len(set(indices)) != len(indices):
                raise ValueError(f'Blocks: {name!r} names a block twice: {list(indices)}')
        if not any(blocks.values()):
            raise ValueError('Blocks: no block is named; leave `replacement` out to train the unmodified backbone')
        self.blocks = {name: sorted(indices) for name, indices in blocks.items()}

    def choose(self, chains: Mapping[str, Chain]) -> Choice:
        for name, indices in self.blocks.items():
            if name not in chains:
                raise ValueError(f'Blocks: there is no stage {name!r}; {describe_replaceable(chains)}')
            for index in indices:
                if not 0 <= index < len(chains[name]):
                    raise ValueError(f'Blocks: {name} has no block {index}, its blocks are 0 to '
                                     f'{len(chains[name]) - 1}; {describe_replaceable(chains)}')
        return {name: list(self.blocks.get(name, [])) for name in chains}

    def __repr__(self) -> str:
        return f'Blocks({self.blocks})'


def describe_replaceable(chains: Mapping[str, Chain]) -> str:
    """One phrase that names every block which can be replaced, for error messages."""
    parts = [f'{name}: {chain.replaceable()}' for name, chain in chains.items() if chain.replaceable()]
    return 'blocks that can be replaced: ' + (', '.join(parts) or 'none')


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
