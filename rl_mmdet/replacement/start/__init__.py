"""From what a replaced model starts: a baseline's checkpoint, fresh norm statistics."""
from .checkpoint import LoadReport, adapt_state_dict
from .norms import recalibrate_norms_, stale_norms
from .other_replacement import other_replacement

__all__ = ['LoadReport', 'adapt_state_dict', 'other_replacement', 'recalibrate_norms_', 'stale_norms']
