"""Replacement Learning for MMDetection: ``import rl_mmdet`` registers everything that a config can name."""

from ._dependencies import check_dependencies

check_dependencies()

from . import datasets, engine, models, search  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = ['__version__', 'datasets', 'engine', 'models', 'search']
