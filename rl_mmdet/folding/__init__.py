"""Convolution and BatchNorm in eval mode as one, for any model; torch only."""
from .fold_norm import fold_norm_, unfold_norm_

__all__ = ['fold_norm_', 'unfold_norm_']
