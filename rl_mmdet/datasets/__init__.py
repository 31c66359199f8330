"""The embedded dataset: detection scenes made of real handwritten digits."""

from .digit_scenes import generate_digit_scenes
from .digits_dataset import DigitScenesDataset

__all__ = ['DigitScenesDataset', 'generate_digit_scenes']
