"""Compare: does Replacement Learning pay, for this detector, on this data?"""
from .carry_out import carry_out, run_in_terminal
from .comparison import Comparison, Run, Variant, parse_variants, plan_comparison
from .contents import Contents, RunResult, VariantResult, collect
from .in_short import in_short
from .runs import LAUNCHERS, Tools, only_one, train_all
from .tables import rich_table, summary_table, tables

__all__ = ['LAUNCHERS', 'Comparison', 'Contents', 'Run', 'RunResult', 'Tools', 'Variant', 'VariantResult', 'carry_out',
           'collect', 'in_short', 'only_one', 'parse_variants', 'plan_comparison', 'rich_table', 'run_in_terminal',
           'summary_table', 'tables', 'train_all']
