"""From what a replaced model starts: a baseline's checkpoint, fresh norm statistics."""
from .checkpoint import LoadReport, adapt_state_dict
from .norms import recalibrate_norms_, stale_norms

__all__ = ['LoadReport', 'adapt_state_dict', 'recalibrate_norms_', 'stale_norms']
