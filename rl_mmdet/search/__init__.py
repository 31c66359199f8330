"""SWR: a small policy network learns, in the first part of a training, which blocks are replaced or which tensors are
updated, so that a limit is kept. When the search ends the network is dropped and an ordinary model goes on.

Source: "Scalable Weight Reparametrization for Efficient Transfer Learning", arXiv 2302.13435.
"""
from .begin_search import begin_search, searched_setting
from .block_search import BlockSearch
from .learned_plan import LearnedPlan
from .policy import Policy
from .search_base import Search, SearchResult
from .search_space import SearchSpace
from .tensor_search import TensorSearch
from .transfers import SWR, TRANSFERS, Tensors
from .units import Unit

__all__ = ['SWR', 'TRANSFERS', 'BlockSearch', 'LearnedPlan', 'Policy', 'Search', 'SearchResult', 'SearchSpace',
           'TensorSearch', 'Tensors', 'Unit', 'begin_search', 'searched_setting']
