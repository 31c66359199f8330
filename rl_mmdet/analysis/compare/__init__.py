"""Compare: does Replacement Learning pay, for this detector, on this data?"""
from .carry_out import carry_out
from .comparison import Comparison, parse_variants, plan_comparison
from .contents import Contents, collect
from .report import check_report_folder
from .runs import Tools

__all__ = ['Comparison', 'Contents', 'Tools', 'carry_out', 'check_report_folder', 'collect', 'parse_variants',
           'plan_comparison']
