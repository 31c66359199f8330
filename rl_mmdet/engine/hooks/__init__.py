"""MMEngine hooks that training with Replacement Learning needs."""
from .finite_loss import FiniteLossHook
from .fit_outputs import FitOutputsHook
from .learning_steps import LearningStepsHook
from .log_coefficients import LogCoefficientsHook
from .recalibrate_norms import RecalibrateNormsHook
from .resume import ResumeHook
from .search import SearchHook
from .whole_checkpoints import WholeCheckpointHook

__all__ = ['FiniteLossHook', 'FitOutputsHook', 'LearningStepsHook', 'LogCoefficientsHook', 'RecalibrateNormsHook',
           'ResumeHook', 'SearchHook', 'WholeCheckpointHook']
