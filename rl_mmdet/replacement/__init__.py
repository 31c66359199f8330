"""Replacement Learning, the method: torch and MMEngine's Registry only.

Five words describe a replacement: the *plan* (where), the *fusion* (with what), the *operator* (as what), the
*gradient* (how it learns) and the *start* (from what).

    >>> from rl_mmdet.replacement import replace_blocks_, materialize
    >>> report = replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2)))
    >>> plain = materialize(model)

Sources: "Replacement Learning: Training Vision Tasks with Fewer Learnable Parameters", arXiv 2410.01239 (RL-v1);
"Replacement Learning: Training Neural Networks with Fewer Parameters", arXiv 2605.19533 (RL-v2).
"""
from . import fusions, operators, plans, start  # noqa: F401  their classes register themselves
from .chain import find_chains
from .computing_layer import ComputingLayer, computing_layers, set_step_
from .registry import FUSIONS, OPERATORS, PLANS, STARTS
from .report import ReplacementReport
from .start import adapt_state_dict, fit_outputs_, recalibrate_norms_, stale_norms
from .surgery import materialize, replace_blocks_

__all__ = ['FUSIONS', 'OPERATORS', 'PLANS', 'STARTS', 'ComputingLayer', 'ReplacementReport', 'adapt_state_dict',
           'computing_layers', 'find_chains', 'fit_outputs_', 'materialize', 'recalibrate_norms_', 'replace_blocks_',
           'set_step_', 'stale_norms']
