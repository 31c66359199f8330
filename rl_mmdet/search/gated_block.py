"""Gated blocks: a block and the computing layer that could stand there, side by side while a plan is being learned."""
import warnings
from dataclasses import dataclass
from functools import cache, partialmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._torch_compat import map_pairs, no_grad, other_ways_forward
from ..replacement.computing_layer import ComputingLayer


@dataclass
class Gate:
    """Whether the block or the computing layer runs, and whether the other one runs as well.

    Args:
        replace: g; the computing layer runs, else the block.
        leaf: a number that gets the gradient with respect to g; None if it isn't wanted.
        alone: only that one runs. Else the other one runs, too, without gradient.
        drawn: False as long as no gate was drawn. Both run then, so that BatchNorm statistics of both can be
            recalibrated.
    """
    replace: bool = False
    leaf: Tensor | None = None
    alone: bool = False
    drawn: bool = False


class GatedBlock(nn.Module):
    r"""Mixed into the class of a block while it is open whether the block is replaced.

    .. math:: h_{out} = B(h_{in}) + g\,\big(C(h_{in}) - B(h_{in})\big), \quad g ∈ \{0, 1\}, \qquad
              \frac{∂L}{∂g} = \Big⟨\frac{∂L}{∂h_{out}},\; C(h_{in}) - B(h_{in})\Big⟩

    What isn't chosen runs without gradient and only for ∂L/∂g, so a step costs at most one more forward run of these
    blocks; for backward one more tensor of each output's size is kept.

    The block stays what it is: a module of its class, with its keys in the state dict. The computing layer is a child.
    Neither may change its input in place.

    Attributes:
        replaced: the computing layer.
        gate: which of the two runs.
    """
    replaced: ComputingLayer
    gate: Gate

    def __setattr__(self, name: str, value: Any) -> None:
        """What a stage tells its blocks is for both of them."""
        super().__setattr__(name, value)
        replaced, mine = self._modules.get('replaced'), isinstance(value, (nn.Module, nn.Parameter, Gate))
        if not (replaced is None or mine or name in vars(type(self)) or replaced.is_own(name)):
            setattr(replaced, name, value)

    def _run_gated(self, method: str, *args: Any, **kwargs: Any) -> Any:
        gate = self.gate
        chosen = self._run_one(gate.replace, method, *args, **kwargs)
        if gate.alone or (gate.drawn and not torch.is_grad_enabled()):
            return chosen
        with no_grad():
            other = self._run_one(not gate.replace, method, *args, **kwargs)
        if gate.leaf is None:
            if not gate.drawn and torch.is_grad_enabled():
                warnings.warn('a model whose plan is to be learned runs with gradient, but no gates were drawn: it is '
                              'the unreplaced model; training needs SearchHook or a BlockSearch', stacklevel=2)
            return chosen
        sign = 1 if gate.replace else -1
        return map_pairs(lambda one, another: _Gated.apply(one, another, gate.leaf, sign) if isinstance(one, Tensor)
                         else one, chosen, other)

    def _run_one(self, replace: bool, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the computing layer, or the block, makes of these inputs."""
        if replace:
            return getattr(self.replaced, method)(*args, **kwargs)
        return getattr(plain_class(self), method)(self, *args, **kwargs)


class _Gated(torch.autograd.Function):
    """The chosen output as it is, with the gradient that the gate would get from both."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, other: Tensor, leaf: Tensor, sign: int) -> Tensor:
        ctx.save_for_backward(chosen - other)
        ctx.sign = sign
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        difference, = ctx.saved_tensors
        return grad, None, ctx.sign * (grad.float() * difference.float()).sum(), None


def gate_(block: nn.Module, replaced: ComputingLayer) -> None:
    """Make ``block`` a gated one, in place."""
    block.__class__ = _gated_class(type(block))
    block.replaced = replaced
    block.gate = Gate()


def ungate_(block: GatedBlock) -> ComputingLayer:
    """Make ``block`` what it was before :func:`gate_`, in place; returns the computing layer."""
    replaced = block.replaced
    replaced.provisional = False
    block.__class__ = plain_class(block)
    del block.replaced, block.gate
    return replaced


def plain_class(block: GatedBlock) -> type[nn.Module]:
    """The class of a gated block without its gate."""
    return type(block).__bases__[1]


@cache
def _gated_class(cls: type[nn.Module]) -> type[GatedBlock]:
    """The class of gated blocks of a class: all its ways forward run through the gate."""
    ways = {name: partialmethod(GatedBlock._run_gated, name) for name in ('forward', *other_ways_forward(cls))}
    return type(cls.__name__, (GatedBlock, cls), ways)
