"""What a model costs, and how runs compare."""
from ..replacement.flops import count_flops
from .blocks import block_table
from .choose_blocks import choose_blocks, error_table
from .cost import saved_bytes, trainable_parameters
from .side_by_side import Comparison, compare_side_by_side
from .step_time import StepTimes, alternate_steps
from .training_run import TrainingCost, run_training

__all__ = ['Comparison', 'StepTimes', 'TrainingCost', 'alternate_steps', 'block_table', 'choose_blocks',
           'compare_side_by_side', 'count_flops', 'error_table', 'run_training', 'saved_bytes',
           'trainable_parameters']
