"""RL-v2: a thin copy of the block."""
import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..._torch_compat import is_recorded
from ..block_structure import branch, convolutions, mlp, same_padding
from ..checks import check_number
from ..registry import OPERATORS
from ..resize import Shape
from .light_operator import LightOperator, misfit_of_convolutions


@OPERATORS.register_module()
class SlimBlock(LightOperator):
    r"""A thin copy of the block: the first of its hidden channels, with their share of the fused weights.

    For blocks of convolutions in a row (BasicBlock, Bottleneck, ResNeXt's) that keep stride and width

    .. math:: h_{out} = h_{in} + γ ⊙ \hat W_n * σ(\dots σ(\hat W_1 * h_{in}))

    with σ the ReLU and :math:`\hat W` the slice of a fused weight, each output channel's part brought to length
    :math:`\sqrt 2` (the last one's to 1): this does what norms would, without statistics. For attention blocks (Swin,
    ViT) the thin MLP,

    .. math:: h_{out} = h_{in} + γ ⊙ W_2[:, :m]\,σ(W_1[:m]\,\mathrm{LN}(h_{in}) + b_1[:m])

    with m of the hidden units and the block's own activation and norm. γ is part of the last weight. Materialized it
    is these two or three ordinary layers.

    With the part p of hidden channels: FLOPs :math:`(8p + 9p^2)/17` of a Bottleneck's, p of a BasicBlock's, 2p/3 of an
    attention block's apart from attention itself. For backward it saves its thin hidden activations (2m per position
    in a Bottleneck; C + 2m in an attention block) and its output, C.

    It drops: most hidden channels, norms and the last activation of convolution blocks; attention, the second bias
    and most hidden units of attention blocks.

    Args:
        width: p, the part of the hidden channels that stay, above 0 and at most 1; at least one group stays.
        scale: start of γ, one number per channel; at 0 the start is the identity, and the fusion learns from the
            second step on.

    Raises:
        ValueError: ``width`` out of range; ``scale`` isn't a finite number.

    Source: arXiv 2605.19533 ("computing layer"); the form is ours.
    """

    repeatable = True

    def __init__(self, width: float = 0.0625, scale: float = 0.0) -> None:
        self.scale = float(check_number('SlimBlock: scale', scale))
        self.width = check_number('SlimBlock: width', width, above=0, most=1)

    def needs(self, block: nn.Module) -> dict[str, Shape]:
        found = mlp(block)
        if found is None:
            names = [f'{name}.weight' for name in branch(block)]
        else:
            names = [f'{name}.{slot}' for name in (found.norm, found.expand)
                     for slot, _ in block.get_submodule(name).named_parameters()] + [f'{found.project}.weight']
        return {name: tuple(parameter.shape)
                for name, parameter in zip(names, self.template(block).parameters(), strict=True)}

    def template(self, block: nn.Module) -> nn.Module:
        found = mlp(block)
        with torch.device('meta'):
            if found is None:
                return SlimConvolutions(list(branch(block).values()), self.width)
            norm, expand = block.get_submodule(found.norm), block.get_submodule(found.expand)
            return SlimMlp(found.channels, _part(found.hidden, self.width), expand.bias is not None, norm.eps,
                           norm.bias is not None, copy.deepcopy(found.activation))

    def weights(self, template: nn.Module, tensors: dict[str, Tensor],
                parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        *hidden, last = _with_lengths(*tensors.values()) if template.unit_length else tensors.values()
        scaled = parameters['scale'].view(-1, *[1] * (last.ndim - 1)) * last
        return dict(zip(template.slots, [*hidden, scaled], strict=True))

    def start(self, block: nn.Module) -> dict[str, Tensor]:
        found = mlp(block)
        channels = next(iter(convolutions(block).values())).in_channels if found is None else found.channels
        return {'scale': torch.full((channels,), self.scale, device='cpu')}  # also on meta

    def misfit(self, block: nn.Module) -> str | None:
        if mlp(block) is not None:
            return None
        reason = misfit_of_convolutions(block)
        if reason is None and branch(block) is None:
            return 'its residual branch is more than ordinary convolutions in a row'
        return reason

    def __repr__(self) -> str:
        return f'SlimBlock(width={self.width}, scale={self.scale})'


class SlimConvolutions(nn.Module):
    """Thin convolutions in a row with ReLUs between them, added to their input. See :class:`SlimBlock`.

    Args:
        convs: the removed block's.
        width: part of the hidden channels that stay.
    """
    unit_length = True

    def __init__(self, convs: list[nn.Conv2d], width: float) -> None:
        super().__init__()
        unit = math.lcm(*(conv.out_channels // conv.groups for conv in convs[:-1] if conv.groups > 1))
        channels = [convs[0].in_channels, *(_part(conv.out_channels, width, unit) for conv in convs[:-1]),
                    convs[-1].out_channels]
        self.convs = nn.Sequential(*(
            nn.Conv2d(before, after, conv.kernel_size, padding=same_padding(conv), dilation=conv.dilation,
                      groups=max(1, after * conv.groups // conv.out_channels), bias=False)
            for before, after, conv in zip(channels, channels[1:], convs, strict=False)))
        self.slots = [name for name, _ in self.named_parameters()]

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.convs
        out = x
        for conv in hidden:
            out = F.relu(conv(out), inplace=True)
        return x + last(out)

    def init_weights(self) -> None:
        """MMEngine calls it: weights of its own (``OwnWeights``) start as the identity."""
        nn.init.zeros_(self.convs[-1].weight)


class SlimMlp(nn.Module):
    """Norm, linear, activation, linear on channels that come last, added to their input. See :class:`SlimBlock`."""

    unit_length = False

    def __init__(self, channels: int, hidden: int, bias: bool, eps: float, norm_bias: bool,
                 activation: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps, bias=norm_bias)
        self.expand = nn.Linear(channels, hidden, bias=bias)
        self.activation = activation
        self.project = nn.Linear(hidden, channels, bias=False)
        self.slots = [name for name, _ in self.named_parameters()]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x`` is (..., channels); what else the removed block was given is of no use here."""
        return x + self.project(self.activation(self.expand(self.norm(x))))


def _part(channels: int, width: float, unit: int = 1) -> int:
    """About ``width`` of ``channels``, a multiple of ``unit``, at least one of these."""
    return min(channels, max(1, round(channels * width / unit)) * unit)


def _with_lengths(*weights: Tensor) -> Sequence[Tensor]:
    """Weights with each output channel's part brought to length √2, in the last of them to 1; zeros stay zeros."""
    if not is_recorded():
        return _Lengths.apply(*weights)
    *hidden, last = (F.normalize(weight.flatten(1), dim=1, eps=_tiny_of(weight)).view_as(weight) for weight in weights)
    return [*(math.sqrt(2) * weight for weight in hidden), last]


class _Lengths(torch.autograd.Function):
    r"""What :func:`_with_lengths` says, for all of a block's weights in a third of ``F.normalize``'s calls.

    .. math:: \hat w = l\,\frac{w}{‖w‖}, \qquad \frac{∂L}{∂w} = \frac{l}{‖w‖}
        \Bigl(g - \hat w\,\frac{⟨\hat w, g⟩}{l^2}\Bigr), \qquad g = \frac{∂L}{∂\hat w}

    with the length l. A compiler makes few kernels of ``F.normalize`` by itself; it and exporters don't know this one.
    """

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        norms = [torch.linalg.vector_norm(weight, dim=_inner(weight), keepdim=True) for weight in weights]
        torch._foreach_clamp_min_(norms, _tiny_of(weights[0]))
        torch._foreach_div_(norms[:-1], math.sqrt(2))
        made = torch._foreach_div(weights, norms)
        ctx.save_for_backward(*made, *norms)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        made, norms = saved[:len(grads)], saved[len(grads):]
        along = [product.sum(_inner(product), keepdim=True) for product in torch._foreach_mul(made, grads)]
        torch._foreach_div_(along[:-1], 2)
        found = torch._foreach_sub(grads, torch._foreach_mul(made, along))
        torch._foreach_div_(found, norms)
        return tuple(found)


def _inner(weight: Tensor) -> tuple[int, ...]:
    """All dimensions but that of the output channels."""
    return tuple(range(1, weight.ndim))


def _tiny_of(weight: Tensor) -> float:
    """The shortest length that a weight is divided by.

    Shorter ones have squares that are 0 in float32, and gradients divided by much less wouldn't be finite.
    """
    return max(torch.finfo(weight.dtype).tiny, 1e-19)
