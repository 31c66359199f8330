"""Replacement Learning for MMDetection: ``import rl_mmdet`` registers everything that a config can name."""

from ._dependencies import check_dependencies

check_dependencies()

from . import datasets, engine, models, search  # noqa: E402, F401  what configs name registers itself
from .folding import fold_norm_, unfold_norm_  # noqa: E402
from .replacement import find_chains, materialize, recalibrate_norms_, replace_blocks_, set_step_  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = ['__version__', 'find_chains', 'fold_norm_', 'materialize', 'recalibrate_norms_', 'replace_blocks_',
           'set_step_', 'unfold_norm_']
