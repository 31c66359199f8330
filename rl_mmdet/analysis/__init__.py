"""What a model costs, and how runs compare."""
from ..replacement.flops import count_flops
from ..replacement.saved_bytes import saved_bytes
from .blocks import block_table
from .choose_blocks import choose_blocks, cost_lines, error_table, warning_lines
from .cost import mean_over_steps, peak_memory, ratios_to, seconds_in_turn, trainable_parameters
from .savings import saving_lines, savings_table
from .training_run import TrainingCost, run_training

__all__ = ['TrainingCost', 'block_table', 'choose_blocks', 'cost_lines', 'count_flops', 'error_table',
           'mean_over_steps', 'peak_memory', 'ratios_to', 'run_training', 'saved_bytes', 'saving_lines',
           'savings_table', 'seconds_in_turn', 'trainable_parameters', 'warning_lines']
