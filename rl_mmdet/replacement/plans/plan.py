"""What all plans share: they choose blocks, and replace them."""
from collections.abc import Mapping

from torch import nn

from ..block_structure import copy_around_parameters
from ..chain import Chain, Choice, find_chains
from ..computing_layer import LayerSettings
from ..fusions import Fusion, OwnWeights
from ..report import ReplacementReport
from ..surgery import check_choice, replace_chosen_


class Plan:
    """Chooses blocks."""

    def choose(self, chains: Mapping[str, Chain], model: nn.Module | None = None,
               settings: LayerSettings | None = None) -> Choice:
        """Which blocks to replace. Nothing is changed, neither ``chains`` nor ``model``.

        Args:
            chains: of the model, before any block is replaced.
            model: for plans that measure it.
            settings: for plans that try a replacement: the fusion, operator and gradient to try it with.

        Returns:
            Block indices by chain name, in order; every chain is named.

        Raises:
            ValueError: the plan doesn't fit the model.
        """
        raise NotImplementedError

    def carry_out_(self, model: nn.Module, chains: Mapping[str, Chain], settings: LayerSettings) -> ReplacementReport:
        """Replace blocks of ``model`` in place; here those that are chosen now.

        Raises:
            ValueError: the plan doesn't fit the model, which is then untouched.
        """
        try:
            choice = self.choose(chains, model, settings)
            check_choice(chains, choice, self)
        except ValueError as error:
            said = str(error)  # a plan that tries a replacement may have met an error of another setting
            raise ValueError(said if said.startswith('replacement.') else f'replacement.plan: {said}') from None
        return replace_chosen_(model, chains, choice, settings)

    def _tried(self, model: nn.Module, choice: Choice, settings: LayerSettings) -> nn.Module:
        """A copy of ``model`` with the blocks of a valid choice replaced, for plans that measure what that gives.

        Its parameters *are* the model's, so it takes next to no memory; they must not be written to. Modes and buffers
        are its own.

        Raises:
            ValueError: the fusion can't make a block's tensors.
        """
        self._check_makes(settings.fusion)
        twin = copy_around_parameters(model)
        replace_chosen_(twin, find_chains(twin, settings.fusion.adapt, settings.operator), choice, settings)
        return twin

    def _check_makes(self, fusion: Fusion) -> None:
        """Raise a ValueError if the fusion makes nothing that could be measured."""
        if isinstance(fusion, OwnWeights):
            raise ValueError(f'{self} chooses what is made of other blocks\' weights, and {fusion} makes nothing; take '
                             'another fusion or plan')

    def _arguments(self) -> str:
        """The plan's arguments, as in a call."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self._arguments()})'


def add_(choice: Choice, chains: Mapping[str, Chain], name: str, index: int) -> bool:
    """Add a block to a valid choice, unless it is there or would make the choice invalid; returns whether it did."""
    tried = choice | {name: sorted([*choice[name], index])}
    if index in choice[name] or any(chains[chain].why_not(block, tried) for chain in tried for block in tried[chain]):
        return False
    choice[name] = tried[name]
    return True
