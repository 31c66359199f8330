"""MMEngine's side of Replacement Learning: hooks, optimizer-wrapper constructor, configs, checkpoints, preflight."""
from .arguments import config_arguments, run_arguments
from .checkpoint import check_checkpoint, read_checkpoint
from .config import add_rl_defaults_, load_config
from .errors import NonFiniteLossError, UserError
from .files import check_new_file, write_text, written_whole
from .hooks import FiniteLossHook, LearningStepsHook, LogCoefficientsHook, RecalibrateNormsHook, SearchHook
from .launch import build_runner, set_local_rank, tool
from .optim import RLLayerDecayOptimWrapperConstructor, RLOptimWrapperConstructor
from .options import (
    check_out_file,
    dump_predictions_,
    enable_amp_,
    enable_auto_scale_lr_,
    enable_tta_,
    enable_visualization_,
    set_resume_,
)
from .preflight import build_model, check_testing, check_training, inspect_training, prepare_files, resume_source
from .search import take_found_

__all__ = [
    'FiniteLossHook', 'LearningStepsHook', 'LogCoefficientsHook', 'NonFiniteLossError',
    'RLLayerDecayOptimWrapperConstructor', 'RLOptimWrapperConstructor', 'RecalibrateNormsHook', 'SearchHook',
    'UserError', 'add_rl_defaults_', 'build_model', 'build_runner', 'check_checkpoint', 'check_new_file',
    'check_out_file', 'check_testing', 'check_training', 'config_arguments', 'dump_predictions_', 'enable_amp_',
    'enable_auto_scale_lr_', 'enable_tta_', 'enable_visualization_', 'inspect_training', 'load_config',
    'prepare_files', 'read_checkpoint', 'resume_source', 'run_arguments', 'set_local_rank', 'set_resume_',
    'take_found_', 'tool', 'write_text', 'written_whole',
]
