"""What a policy decides about, and how it sees it."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Unit:
    """A block that may be replaced, or a tensor that may be updated.

    Args:
        name: in the model.
        stage: name of its stage.
        depth: where it stands in the model, from 0, the input, to 1.
        kind: what it is, such as a class's or a parameter's name.
        size: number of parameters.
        weight: how much taking it adds to the limited quantity; negative if it saves.
    """
    name: str
    stage: str
    depth: float
    kind: str
    size: int
    weight: float


def descriptors(units: Sequence[Unit]) -> Tensor:
    """(units, features): what the policy network sees of each unit.

    These are depth, two sine and cosine waves of it for what changes along the model, the logarithm of the size, the
    weight, and one-hot stage and kind. Each feature has mean 0 and variance 1; constant ones are left out.
    """
    stages, kinds = (sorted({getattr(unit, key) for unit in units}) for key in ('stage', 'kind'))
    rows = [[unit.depth, *(wave(math.pi * n * unit.depth) for n in (1, 2) for wave in (math.sin, math.cos)),
             math.log(unit.size + 1), unit.weight, *(float(unit.stage == stage) for stage in stages),
             *(float(unit.kind == kind) for kind in kinds)] for unit in units]
    table = torch.tensor(rows)
    spread = table.std(0, correction=0)
    varies = spread > 1e-6 * table.abs().amax(0)
    if not varies.any():
        return torch.zeros(len(units), 1)
    return (table[:, varies] - table[:, varies].mean(0)) / spread[varies]


class PolicyNetwork(nn.Module):
    """From descriptors to a score for each unit: two layers, and a bias per unit for what descriptors can't tell apart.

    All units start with the score 0.

    Args:
        units: how many.
        features: how many descriptors each has.
        hidden: width.
    """

    def __init__(self, units: int, features: int, hidden: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.out = nn.Linear(hidden, 1, bias=False)
        self.own = nn.Parameter(torch.zeros(units))
        nn.init.zeros_(self.out.weight)

    def forward(self, table: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(table)))[:, 0] + self.own
