"""The search space of a learned plan: the blocks of a model of which it is open whether they are replaced."""
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..replacement.chain import Chain, Choice, Place, describe_replaceable
from ..replacement.computing_layer import ComputingLayer, LayerSettings
from ..replacement.plans.trial import copy_around_parameters
from ..replacement.report import ReplacementReport, describe_blocks, with_layers
from ..replacement.surgery import prepare_followers_
from .gated_block import GatedBlock, gate_, ungate_

NAME = 'search_space'
"""Attribute of a model that is being searched."""


class SearchSpace:
    """All blocks that can be replaced, each with the computing layer that could stand there beside it.

    Args:
        model: its blocks become gated ones, in place, see :class:`~.gated_block.GatedBlock`; the space is kept as its
            attribute ``search_space``. A deep copy of the model has its own.
        chains: of the model.
        plan: that is to be learned.
        savings: what replacing each of the blocks would save, in the plan's unit.
        settings: of the computing layers.

    Attributes:
        places: where these blocks stand, in the model's order. Gates and probabilities are counted like this.
    """

    def __init__(self, model: nn.Module, chains: Mapping[str, Chain], plan: Any,
                 savings: Sequence[float], settings: LayerSettings) -> None:
        self.chains = dict(chains)
        self.plan = plan
        self.savings = list(savings)
        self.places = [Place(chain, index) for chain in chains.values() for index in chain.replaceable()]
        self.rows = tuple(replace(row, open=row.reason is None) for row in describe_blocks(self.chains, {}))
        layers = [ComputingLayer(chain, index, {chain.name: [index]}, settings, copy_around_parameters(block))
                  for (chain, index), block in zip(self.places, self.blocks, strict=True)]
        for place, layer in zip(self.places, layers, strict=True):
            gate_(place.block, layer)
        setattr(model, NAME, self)

    @property
    def blocks(self) -> list[GatedBlock]:
        return [place.block for place in self.places]

    @property
    def open(self) -> bool:
        """Whether a choice is still to be made."""
        return any(isinstance(block, GatedBlock) for block in self.blocks)

    def choice(self, replaced: Sequence[bool]) -> Choice:
        """The choice that replaces these of the blocks."""
        choice: Choice = {name: [] for name in self.chains}
        for (chain, index), wanted in zip(self.places, replaced, strict=True):
            if wanted:
                choice[chain.name].append(index)
        return choice

    def fits(self, replaced: Sequence[bool]) -> bool:
        """Whether these blocks can be replaced together."""
        choice = self.choice(replaced)
        return not any(chain.why_not(index, choice) for chain in self.chains.values() for index in choice[chain.name])

    def set_gates(self, replaced: Sequence[bool], leaves: Sequence[Tensor | None] | None = None,
                  settled: Sequence[bool] | None = None) -> None:
        """Let these blocks be replaced from now on, and each computing layer use the blocks that are kept now.

        A block that can't be replaced beside these runs alone in the meantime.

        Args:
            replaced: blocks that fit together.
            leaves: tensors that get the gradients with respect to the gates; none by default.
            settled: blocks of which only the one that is chosen runs; none by default.
        """
        choice = self.choice(replaced)
        for number, (chain, index) in enumerate(self.places):
            gate = chain.blocks[index].gate
            gate.replace, gate.fresh = replaced[number], False
            gate.leaf = None if leaves is None else leaves[number]
            gate.settled = settled is not None and settled[number]
            if not replaced[number] and not gate.settled:
                beside = choice | {chain.name: sorted([*choice[chain.name], index])}
                gate.settled = chain.why_not(index, beside) is not None
            if replaced[number] or not gate.settled:
                chain.blocks[index].replaced.take_from(chain, index, choice)


def finish_search_(model: nn.Module, choice: Mapping[str, Sequence[int]]) -> ReplacementReport:
    """Turn a model that is being searched into the replaced model with this choice, in place.

    All tensors that are left stay the same objects: optimizers go on with them. The computing layers of blocks that are
    kept, and the blocks that are replaced, are gone.

    Args:
        model: with a :class:`SearchSpace`.
        choice: block indices by chain name, of blocks that fit together.

    Returns:
        As :func:`~rl_mmdet.replacement.replace_blocks_`.

    Raises:
        ValueError: a block isn't one of the space's. The model is then untouched.
    """
    space: SearchSpace = getattr(model, NAME)
    known = {(chain.name, index) for chain, index in space.places}
    for name, index in ((name, index) for name, indices in choice.items() for index in indices):
        if (name, index) not in known:
            raise ValueError(f'{name} block {index} isn\'t one of those that may be replaced; '
                             f'{describe_replaceable(space.chains)}')
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
    return ReplacementReport(with_layers(rows, {place.name: layer for place, layer in layers.items()}),
                             dict(plan=f'{space.plan}'))
