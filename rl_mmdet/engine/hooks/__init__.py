"""MMEngine hooks that training with Replacement Learning needs."""
from .finite_loss import FiniteLossHook
from .log_coefficients import LogCoefficientsHook
from .recalibrate_norms import RecalibrateNormsHook
from .search import SearchHook

__all__ = ['FiniteLossHook', 'LogCoefficientsHook', 'RecalibrateNormsHook', 'SearchHook']
