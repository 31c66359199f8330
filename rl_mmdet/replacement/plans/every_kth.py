"""Replace every k-th block of a chain."""
from collections.abc import Mapping

from torch import nn

from ..chain import Chain, Choice
from ..checks import check_number
from ..computing_layer import LayerSettings
from ..registry import PLANS
from .plan import Plan


@PLANS.register_module()
class EveryKth(Plan):
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
        self.k = check_number('EveryKth: k', k, whole=True, least=2,
                              hint='k=2 replaces every other block, k=4 every fourth')
        self.offset = check_number('EveryKth: offset', offset, whole=True, least=0, most=k - 1, hint=f'k is {k}')

    def choose(self, chains: Mapping[str, Chain], model: nn.Module | None = None,
               settings: LayerSettings | None = None) -> Choice:
        return {name: [i for i in chain.replaceable() if i % self.k == self.offset]
                for name, chain in chains.items()}

    def _arguments(self) -> str:
        return f'k={self.k}, offset={self.offset}'
