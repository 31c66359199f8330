"""SWR: a policy network learns where, under a budget, and then disappears; torch and the method only.

Source: "Scalable Weight Reparametrization for Efficient Transfer Learning", arXiv 2302.13435.
"""
from .block_search import BlockSearch
from .learned_plan import LearnedPlan, RandomPlan
from .policy import Policy, PolicyNetwork, Unit

__all__ = ['BlockSearch', 'LearnedPlan', 'Policy', 'PolicyNetwork', 'RandomPlan', 'Unit']
