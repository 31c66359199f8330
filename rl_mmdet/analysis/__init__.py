"""What a model costs, and how runs compare."""
from ..replacement.flops import count_flops
from .blocks import block_table
from .choose_blocks import choose_blocks, error_table
from .cost import peak_memory, saved_bytes, trainable_parameters
from .side_by_side import Comparison, compare_side_by_side
from .step_time import StepTimes, alternate_steps, ratios_to, seconds_in_turn
from .training_run import TrainingCost, run_training
from .training_step import TrainingStep, backbone_step, counted_regions, detector_step

__all__ = ['Comparison', 'StepTimes', 'TrainingCost', 'TrainingStep', 'alternate_steps', 'backbone_step', 'block_table',
           'choose_blocks', 'compare_side_by_side', 'count_flops', 'counted_regions', 'detector_step', 'error_table',
           'peak_memory', 'ratios_to', 'run_training', 'saved_bytes', 'seconds_in_turn', 'trainable_parameters']
