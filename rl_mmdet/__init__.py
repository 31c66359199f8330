"""Replacement Learning for MMDetection: ``import rl_mmdet`` registers everything that a config can name.

Where MMDetection isn't installed, the method alone is there: :mod:`rl_mmdet.replacement`, with torch and MMEngine.
"""
from importlib.util import find_spec

from ._dependencies import check_dependencies
from .folding import fold_norm_, unfold_norm_
from .replacement import find_chains, materialize, recalibrate_norms_, replace_blocks_, set_step_
from .version import __version__

if find_spec('mmdet') is None:
    def __getattr__(name: str) -> None:
        """What needs MMDetection says so, and how to install it."""
        if name in ('analysis', 'datasets', 'deploy', 'engine', 'models'):
            check_dependencies()
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
else:
    check_dependencies()
    from . import datasets, engine, models, search  # noqa: F401  what configs name registers itself

__all__ = ['__version__', 'find_chains', 'fold_norm_', 'materialize', 'recalibrate_norms_', 'replace_blocks_',
           'set_step_', 'unfold_norm_']
