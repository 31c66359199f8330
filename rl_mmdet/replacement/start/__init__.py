"""From what a replaced model starts: a baseline's checkpoint, fits to the removed blocks, fresh norm statistics."""
from .checkpoint import LoadReport, adapt_state_dict
from .fade import Fade
from .fit_outputs import Unexplained, fit_outputs_, layers_to_fit
from .norms import recalibrate_norms_, stale_norms
from .other_replacement import other_replacement
from .starts import Average, FitOutputs

__all__ = ['Average', 'Fade', 'FitOutputs', 'LoadReport', 'Unexplained', 'adapt_state_dict', 'fit_outputs_',
           'layers_to_fit', 'other_replacement', 'recalibrate_norms_', 'stale_norms']
