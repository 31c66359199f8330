"""MMEngine hooks that training with Replacement Learning needs."""
from .finite_loss import FiniteLossHook
from .recalibrate_norms import RecalibrateNormsHook

__all__ = ['FiniteLossHook', 'RecalibrateNormsHook']
