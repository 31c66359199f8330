"""Replacement Learning, the method: torch and MMEngine's Registry only.

Four words describe a replacement: the *plan* (where), the *fusion* (with what), the *operator* (as what) and the
*gradient* (how it learns).

    >>> from rl_mmdet.replacement import replace_blocks_, materialize
    >>> report = replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2)))
    >>> plain = materialize(model)

Sources: "Replacement Learning: Training Vision Tasks with Fewer Learnable Parameters", arXiv 2410.01239 (RL-v1);
"Replacement Learning: Training Neural Networks with Fewer Parameters", arXiv 2605.19533 (RL-v2).
"""
from .chain import Chain, find_chains
from .computing_layer import ComputingLayer
from .fusions import Fit, ScalarFusion
from .gradients import Gradient
from .norms import recalibrate_norms_, stale_norms
from .operators import FullBlock
from .plans import Blocks, EveryKth
from .pretrained import LoadReport, adapt_state_dict
from .registry import FUSIONS, OPERATORS, PLANS
from .report import ReplacementReport
from .surgery import computing_layers, materialize, replace_blocks_

__all__ = [
    'FUSIONS', 'OPERATORS', 'PLANS', 'Blocks', 'Chain', 'ComputingLayer', 'EveryKth', 'Fit', 'FullBlock', 'Gradient',
    'LoadReport', 'ReplacementReport', 'ScalarFusion', 'adapt_state_dict', 'computing_layers', 'find_chains',
    'materialize', 'recalibrate_norms_', 'replace_blocks_', 'stale_norms',
]
