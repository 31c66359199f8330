"""MMEngine's side of Replacement Learning: configs and their checks, checkpoints, hooks, optimizers."""
from .arguments import checkpoint_arguments, config_arguments, run_arguments
from .checkpoint import load_checkpoint_
from .config import add_rl_defaults_, load_config
from .errors import NonFiniteLossError, UserError
from .hooks import (
    FiniteLossHook,
    FitOutputsHook,
    LearningStepsHook,
    LogCoefficientsHook,
    RecalibrateNormsHook,
    SearchHook,
)
from .launch import build_runner, tool
from .optim import RLLayerDecayOptimWrapperConstructor, RLOptimWrapperConstructor
from .preflight import build_model, check_testing, check_training, inspect_training, resume_checkpoint
from .reading import read_checkpoint, safe_reading
from .search import take_found_

__all__ = [
    'FiniteLossHook', 'FitOutputsHook', 'LearningStepsHook', 'LogCoefficientsHook', 'NonFiniteLossError',
    'RLLayerDecayOptimWrapperConstructor', 'RLOptimWrapperConstructor', 'RecalibrateNormsHook', 'SearchHook',
    'UserError', 'add_rl_defaults_', 'build_model', 'build_runner', 'check_testing',
    'check_training', 'checkpoint_arguments', 'config_arguments', 'inspect_training', 'load_checkpoint_',
    'load_config', 'read_checkpoint', 'resume_checkpoint', 'run_arguments', 'safe_reading', 'take_found_', 'tool',
]
