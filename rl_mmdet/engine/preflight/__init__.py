"""Checks of a config that find the user's mistakes before anything is written and before training starts."""
from .checks import check_testing, check_training, inspect_training, prepare_files
from .data import check_data, make_data
from .guard import nothing_global
from .model import build_model, resume_checkpoint

__all__ = ['build_model', 'check_data', 'check_testing', 'check_training', 'inspect_training', 'make_data',
           'nothing_global', 'prepare_files', 'resume_checkpoint']
