"""Where: which blocks of which chains are replaced."""
from .best_fit import BestFit
from .blocks import Blocks
from .every_kth import EveryKth
from .plan import Plan

__all__ = ['BestFit', 'Blocks', 'EveryKth', 'Plan']
