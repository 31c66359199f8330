"""MMEngine hooks that training with Replacement Learning needs."""
from .finite_loss import FiniteLossHook
from .learning_steps import LearningStepsHook
from .resume import ResumeHook
from .search import SearchHook
from .start import StartHook
from .whole_checkpoints import WholeCheckpointHook

__all__ = ['FiniteLossHook', 'LearningStepsHook', 'ResumeHook', 'SearchHook', 'StartHook', 'WholeCheckpointHook']
