"""Averages of weights that leave alone what doesn't change."""
import math

import mmdet
from mmdet.models.layers.ema import ExpMomentumEMA
from packaging.version import Version
from torch import Tensor


def average_exactly_() -> None:
    r"""Let MMDetection's average of a tensor that stays as it is be this tensor, bit for bit.

    MMDetection up to 3.3 computes :math:`(1-m)\,\bar θ + m\,θ`, which rounds in every step: a delta file would then
    hold nearly all of a model of which few tensors have learned. Later versions compute :math:`\bar θ + m(θ - \bar θ)`.
    """
    if Version(mmdet.__version__) < Version('3.4'):
        ExpMomentumEMA.avg_func = _average


def _average(self: ExpMomentumEMA, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
    """In place of ``ExpMomentumEMA.avg_func``."""
    averaged_param.lerp_(source_param, self.momentum + (1 - self.momentum) * math.exp(-(1 + steps) / self.gamma))
