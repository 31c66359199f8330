"""The knapsack problem: which units to take, so that their weights come near a limit and keep it."""
import math

import torch
from torch import Tensor

GRID = 20_000
"""Number of steps into which the sum of all weights is divided."""


def pack(values: Tensor, weights: Tensor, limit: float, tolerance: float) -> list[int]:
    r"""The subset S of largest :math:`\sum_S v` whose weights keep a limit and come near it, by dynamic programming.

    It takes milliseconds for hundreds of units, whatever they weigh. ``scipy.optimize.milp`` branches over the units of
    equal weight that a backbone is full of, for minutes with a ViT's tensors.

    Args:
        values: (N,) v of each unit, of either sign.
        weights: (N,) not negative. They are rounded up to a grid, so that the limit is kept for sure.
        limit: what the weights in S sum up to at most.
        tolerance: how far below the limit their sum may be; it is doubled until there is such a subset.

    Returns:
        Indices of S; none where no subset keeps the limit.
    """
    if limit < 0:
        return []
    unit = weights.sum().item() / GRID or 1.
    steps = (weights / unit).ceil().long().tolist()
    best = torch.full((GRID + len(steps) + 1,), -math.inf, dtype=torch.float64)  # by sum of weights, in grid steps
    best[0] = 0.
    taken = []
    for value, step in zip(values.tolist(), steps, strict=True):
        with_it = torch.full_like(best, -math.inf)
        with_it[step:] = best[:len(best) - step] + value
        taken.append(with_it > best)
        best = torch.maximum(best, with_it)
    left = limit - torch.arange(len(best)) * unit
    keeps = (left >= 0) & best.isfinite()
    while not (keeps & (left <= tolerance)).any():
        tolerance *= 2
    place = int(torch.where(keeps & (left <= tolerance), best, -math.inf).argmax())
    chosen = []
    for index in reversed(range(len(steps))):
        if taken[index][place]:
            chosen.append(index)
            place -= steps[index]
    return chosen
