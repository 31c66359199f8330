"""MMEngine's side of Replacement Learning: configs and their checks, checkpoints, hooks, optimizers."""
from .averages import average_exactly_
from .checkpoint import load_checkpoint_
from .config import add_import_, add_rl_defaults_, load_config
from .errors import NonFiniteLossError, UserError
from .hooks import (
    FiniteLossHook,
    LearningStepsHook,
    ResumeHook,
    SearchHook,
    StartHook,
    WholeCheckpointHook,
)
from .interrupt import saved_when_stopped
from .launch import build_runner, run_tool
from .new_configs import write_new_configs
from .optim import RLLayerDecayOptimWrapperConstructor, RLOptimWrapperConstructor
from .preflight import build_model, check_testing, check_training, inspect_training, resume_checkpoint
from .reading import read_checkpoint, safe_reading
from .resume import begin_or_resume_, checkpoints_in
from .search import take_found_

average_exactly_()

__all__ = [
    'FiniteLossHook', 'LearningStepsHook', 'NonFiniteLossError', 'RLLayerDecayOptimWrapperConstructor',
    'RLOptimWrapperConstructor', 'ResumeHook', 'SearchHook', 'StartHook', 'UserError', 'WholeCheckpointHook',
    'add_import_', 'add_rl_defaults_', 'begin_or_resume_', 'build_model', 'build_runner', 'check_testing',
    'check_training', 'checkpoints_in', 'inspect_training', 'load_checkpoint_', 'load_config', 'read_checkpoint',
    'resume_checkpoint', 'run_tool', 'safe_reading', 'saved_when_stopped', 'take_found_', 'write_new_configs',
]
