"""Which module of a model is being searched, and for what."""
from typing import Any

from torch import nn

from .block_search import BlockSearch
from .search_space import NAME
from .tensor_search import GradientNormSearch, TensorSearch
from .transfers import SWR, GradientNorm

SEARCHES = {SWR: TensorSearch, GradientNorm: GradientNormSearch}


def searched_setting(module: nn.Module) -> Any:
    """The plan or the transfer that is being learned for this module itself; None if there is none."""
    if hasattr(module, NAME):
        return getattr(module, NAME).plan
    transfer = getattr(module, 'transfer', None)
    return transfer if getattr(transfer, 'searches', False) else None


def begin_search(module: nn.Module, steps: int) -> BlockSearch | TensorSearch:
    """The search for a module with such a setting, which has its weights."""
    if hasattr(module, NAME):
        return BlockSearch(module, steps)
    return SEARCHES[type(module.transfer)](module, steps)
