"""SWR: a policy network learns where, under a budget, and then disappears; torch and the method only.

Source: "Scalable Weight Reparametrization for Efficient Transfer Learning", arXiv 2302.13435.
"""
from .block_search import BlockSearch
from .learned_plan import LearnedPlan, RandomPlan
from .policy import Policy, PolicyNetwork, Unit
from .search import begin_search, searched_setting
from .tensor_search import GradientNormSearch, TensorSearch
from .transfers import SWR, GradientNorm, RandomTensors, Tensors

__all__ = ['SWR', 'BlockSearch', 'GradientNorm', 'GradientNormSearch', 'LearnedPlan', 'Policy', 'PolicyNetwork',
           'RandomPlan', 'RandomTensors', 'TensorSearch', 'Tensors', 'Unit', 'begin_search', 'searched_setting']
