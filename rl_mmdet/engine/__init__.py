"""MMEngine's side of Replacement Learning: configs and their checks, checkpoints, hooks, optimizers."""
from .checkpoint import check_checkpoint, read_checkpoint
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
from .new_configs import write_new_configs
from .optim import RLLayerDecayOptimWrapperConstructor, RLOptimWrapperConstructor
from .preflight import build_model, check_testing, check_training, inspect_training, resume_checkpoint
from .search import take_found_

__all__ = [
    'FiniteLossHook', 'FitOutputsHook', 'LearningStepsHook', 'LogCoefficientsHook', 'NonFiniteLossError',
    'RLLayerDecayOptimWrapperConstructor', 'RLOptimWrapperConstructor', 'RecalibrateNormsHook', 'SearchHook',
    'UserError', 'add_rl_defaults_', 'build_model', 'build_runner', 'check_checkpoint', 'check_testing',
    'check_training', 'inspect_training', 'load_config', 'read_checkpoint', 'resume_checkpoint', 'take_found_',
    'tool', 'write_new_configs',
]
