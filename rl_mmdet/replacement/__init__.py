"""Replacement Learning, the method: torch and MMEngine's Registry only.

Four words describe a replacement: the *plan* (where), the *fusion* (with what), the *operator* (as what) and the
*gradient* (how it learns).

    >>> from rl_mmdet.replacement import replace_blocks_, materialize
    >>> report = replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2)))
    >>> plain = materialize(model)

Sources: "Replacement Learning: Training Vision Tasks with Fewer Learnable Parameters", arXiv 2410.01239 (RL-v1);
"Replacement Learning: Training Neural Networks with Fewer Parameters", arXiv 2605.19533 (RL-v2).
"""
from .best_fit import BestFit
from .budget import Budget
from .chain import Chain, find_chains
from .computing_layer import ComputingLayer
from .fold_norm import fold_norm_, unfold_norm_
from .fusions import ChannelFusion, Fit, OwnWeights, ScalarFusion, TransformFusion
from .gradients import Gradient
from .light_operators import DepthwiseBlock, PooledBlock, Skip, SlimBlock
from .norms import recalibrate_norms_, stale_norms
from .operators import FullBlock
from .plans import Blocks, EveryKth, Fraction
from .pretrained import LoadReport, adapt_state_dict
from .references import SharedWeights, StochasticDepth
from .registry import FUSIONS, OPERATORS, PLANS
from .report import ReplacementReport
from .surgery import computing_layers, materialize, replace_blocks_

__all__ = [
    'FUSIONS', 'OPERATORS', 'PLANS', 'BestFit', 'Blocks', 'Budget', 'Chain', 'ChannelFusion', 'ComputingLayer',
    'DepthwiseBlock', 'EveryKth', 'Fit', 'Fraction', 'FullBlock', 'Gradient', 'LoadReport', 'OwnWeights', 'PooledBlock',
    'ReplacementReport', 'ScalarFusion', 'SharedWeights', 'Skip', 'SlimBlock', 'StochasticDepth', 'TransformFusion',
    'adapt_state_dict', 'computing_layers', 'find_chains', 'fold_norm_', 'materialize', 'recalibrate_norms_',
    'replace_blocks_', 'stale_norms', 'unfold_norm_',
]
