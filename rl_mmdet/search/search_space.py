"""The search space of a learned plan: the blocks of a model that may be replaced, each beside its computing layer."""
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..replacement.block_structure import copy_around_parameters
from ..replacement.chain import Chain, Choice, Place
from ..replacement.computing_layer import ComputingLayer, LayerSettings
from ..replacement.report import BlockRow, ReplacementReport, describe_blocks, with_added
from ..replacement.surgery import prepare_followers_
from .gated_block import Gate, GatedBlock, gate_, ungate_

NAME = 'search_space'
"""Attribute of a model that is being searched."""


class SearchSpace:
    """The open blocks of a model: those of which it is still to be chosen whether they are replaced.

    Args:
        model: its open blocks become gated ones, in place (:class:`~.gated_block.GatedBlock`). The space is kept as its
            attribute ``search_space``; a deep copy of the model has its own.
        chains: of the model.
        plan: that is to be learned.
        savings: which share replacing each of the open blocks would save.
        settings: of the computing layers.

    Attributes:
        places: where the open blocks stand, in the model's order. Gates and savings are counted like this.
        rows: of the report, one per block of the model.
    """

    def __init__(self, model: nn.Module, chains: Mapping[str, Chain], plan: Any, savings: Mapping[Place, float],
                 settings: LayerSettings) -> None:
        self.chains = dict(chains)
        self.plan = plan
        self.places, self.savings = list(savings), list(savings.values())
        self.rows = tuple(map(self._open_or_not, describe_blocks(self.chains, {})))
        layers = [ComputingLayer(chain, index, {chain.name: [index]}, settings, copy_around_parameters(block))
                  for (chain, index), block in zip(self.places, self.blocks, strict=True)]
        for block, layer in zip(self.blocks, layers, strict=True):
            gate_(block, layer)
        setattr(model, NAME, self)

    @property
    def blocks(self) -> list[GatedBlock]:
        return [place.block for place in self.places]

    def choice(self, gates: Sequence[bool]) -> Choice:
        """The blocks with open gates, by chain name."""
        choice: Choice = {name: [] for name in self.chains}
        for (chain, index), gate in zip(self.places, gates, strict=True):
            if gate:
                choice[chain.name].append(index)
        return choice

    def fits(self, gates: Sequence[bool]) -> bool:
        """Whether the blocks with open gates can be replaced together."""
        choice = self.choice(gates)
        return not any(chain.why_not(index, choice) for chain in self.chains.values() for index in choice[chain.name])

    def set_gates(self, gates: Sequence[bool], leaves: Sequence[Tensor | None] | None = None,
                  settled: Sequence[bool] | None = None) -> None:
        """Let the computing layer run where a gate is open, on the weights of blocks that are kept now, else the block.

        Of a block that can't be replaced beside the others only the block runs.

        Args:
            gates: of blocks that fit together.
            leaves: tensors that get the gradients with respect to the gates; none by default.
            settled: which blocks run only what their gate says; none by default.
        """
        choice = self.choice(gates)
        leaves, settled = leaves or [None] * len(gates), settled or [False] * len(gates)
        for (chain, index), gate, leaf, alone in zip(self.places, gates, leaves, settled, strict=True):
            if not gate and not alone:
                beside = choice | {chain.name: sorted([*choice[chain.name], index])}
                alone = chain.why_not(index, beside) is not None
            block = chain.blocks[index]
            block.gate = Gate(gate, leaf, alone, drawn=True)
            if gate or not alone:
                block.replaced.take_from(chain, index, choice)

    def _open_or_not(self, row: BlockRow) -> BlockRow:
        """A block's row, which says that it is open, or why it isn't."""
        if row.reason is None and row.name not in {place.name for place in self.places}:
            return replace(row, reason='that would save no learnable parameters')
        return replace(row, open=row.reason is None)


def finish_search_(model: nn.Module, choice: Mapping[str, Sequence[int]]) -> ReplacementReport:
    """Turn a model that is being searched into the replaced model with this choice, in place.

    All tensors that are left stay the same objects, so that optimizers go on with them. The computing layers of blocks
    that are kept, and the blocks that are replaced, are gone.

    Args:
        model: with a :class:`SearchSpace`.
        choice: block indices by chain name, of open blocks that fit together.

    Returns:
        As :func:`~rl_mmdet.replacement.replace_blocks_`.
    """
    space: SearchSpace = getattr(model, NAME)
    choice = {name: sorted(choice.get(name, ())) for name in space.chains}
    beside = {place: ungate_(place.block) for place in space.places}
    layers = {place: layer for place, layer in beside.items() if place.index in choice[place.chain.name]}
    rows = describe_blocks(space.chains, choice)
    for (chain, index), layer in layers.items():
        layer.take_from(chain, index, choice)
    for (chain, index), layer in layers.items():
        chain.container._modules[chain.keys[index]] = layer
    for chain in space.chains.values():
        prepare_followers_(chain)
    delattr(model, NAME)
    added = {place.name: layer.own_parameters().values() for place, layer in layers.items()}
    return ReplacementReport(with_added(rows, added), dict(plan=f'{space.plan}'))
