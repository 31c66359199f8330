"""What a model costs, and how runs compare."""
from ..replacement.flops import count_flops
from ..replacement.saved_bytes import saved_bytes
from .blocks import block_table
from .choose_blocks import choose_blocks, cost_line, error_table, warning_lines
from .cost import mean_over_steps, peak_memory, ratios_to, seconds_in_turn, trainable_parameters
from .savings import savings_table

__all__ = ['block_table', 'choose_blocks', 'cost_line', 'count_flops', 'error_table', 'mean_over_steps', 'peak_memory',
           'ratios_to', 'saved_bytes', 'savings_table', 'seconds_in_turn', 'trainable_parameters', 'warning_lines']
