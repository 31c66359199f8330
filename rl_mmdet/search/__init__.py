"""SWR: a policy network learns where, under a budget, and then disappears; torch and the method only.

Source: "Scalable Weight Reparametrization for Efficient Transfer Learning", arXiv 2302.13435.
"""
from .block_search import BlockSearch
from .learned_plan import LearnedPlan, RandomPlan
from .policy import Policy, PolicyNetwork, Unit
from .search import begin_search, searched_setting
from .search_space import SearchSpace
from .tensor_search import GradientNormSearch, TensorSearch
from .transfers import SWR, TRANSFERS, GradientNorm, RandomTensors, Tensors

__all__ = ['SWR', 'TRANSFERS', 'BlockSearch', 'GradientNorm', 'GradientNormSearch', 'LearnedPlan', 'Policy',
           'PolicyNetwork', 'RandomPlan', 'RandomTensors', 'SearchSpace', 'TensorSearch', 'Tensors', 'Unit',
           'begin_search', 'searched_setting']
