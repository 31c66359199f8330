"""The blocks left out: the yardstick of what replacing can save."""
from typing import Any

from torch import Tensor, nn

from ..block_structure import mlp
from ..registry import OPERATORS
from ..resize import Shape
from .light_operator import LightOperator, misfit_of_convolutions


@OPERATORS.register_module()
class Skip(LightOperator):
    r"""Nothing: :math:`h_{out} = h_{in}`. The yardstick: what removing the blocks would save, and what it costs in AP.

    It needs no tensors, learns nothing and saves nothing, so the fusion has no part in it.
    """

    def needs(self, block: nn.Module) -> dict[str, Shape]:
        return {}

    def template(self, block: nn.Module) -> nn.Module:
        return Nothing()

    def misfit(self, block: nn.Module) -> str | None:
        return misfit_of_convolutions(block) if mlp(block) is None else None


class Nothing(nn.Module):
    """Gives its input back, whatever else it was given."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x
