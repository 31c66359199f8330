"""Where: which blocks of which chains are replaced."""
from .best_fit import BestFit
from .blocks import Blocks
from .budget import Budget
from .every_kth import EveryKth
from .fraction import Fraction
from .plan import Plan

__all__ = ['BestFit', 'Blocks', 'Budget', 'EveryKth', 'Fraction', 'Plan']
