"""Find out whether a module is to be searched, and begin that search."""
from typing import Any

from torch import nn

from .block_search import BlockSearch
from .search_base import Search
from .search_space import NAME
from .tensor_search import TensorSearch


def searched_setting(module: nn.Module) -> Any:
    """The plan or the transfer that is to be learned for this module itself (not for its children); else None."""
    if hasattr(module, NAME):
        return getattr(module, NAME).plan
    transfer = getattr(module, 'transfer', None)
    return transfer if getattr(transfer, 'searches', False) else None


def begin_search(module: nn.Module, steps: int) -> Search:
    """Begin the search for a module that has such a setting, and its initial weights.

    Args:
        module: with a setting to be learned (:func:`searched_setting`).
        steps: length of the search.
    """
    return (BlockSearch if hasattr(module, NAME) else TensorSearch)(module, steps)
