"""MMEngine hooks that training with Replacement Learning needs."""
from .finite_loss import FiniteLossHook
from .fit_outputs import FitOutputsHook
from .learning_steps import LearningStepsHook
from .log_coefficients import LogCoefficientsHook
from .recalibrate_norms import RecalibrateNormsHook
from .search import SearchHook

__all__ = ['FiniteLossHook', 'FitOutputsHook', 'LearningStepsHook', 'LogCoefficientsHook', 'RecalibrateNormsHook',
           'SearchHook']
