"""Light operators (RL-v2): computations of a few per cent of the block they stand for, identity at scale 0."""
import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block_parts import branch, convolutions, keeps_its_shape, mlp, other_ways_forward, same_padding
from .operators import Operator
from .registry import OPERATORS
from .resize import Shape, stretch


class LightOperator(Operator):
    """What light operators share: :math:`h_{out} = h_{in} + γ ⊙ C(h_{in})`, γ learnable, one number per channel.

    Args:
        scale: start of all γ; at 0 the start is the identity, and the fusion learns from the second step on.
            docs/results/digits_operators.md and pretrained_scale.md have the measurements behind the defaults.

    Raises:
        ValueError: ``scale`` isn't a finite number.
    """
    light = True

    def __init__(self, scale: float) -> None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f'{type(self).__name__}: scale must be a finite number, got {scale!r}')
        self.scale = float(scale)

    def why_not(self, block: nn.Module) -> str | None:
        name = f'{type(self).__name__} can\'t stand for a {type(block).__name__}'
        ways = other_ways_forward(type(block))
        if ways:
            return f'{name}, which its backbone also runs by {ways[0]}(); FullBlock can'
        reason = self._misfit(block)
        if reason is None:
            return None
        fitting = [cls.__name__ for cls in LIGHT if cls is not type(self) and cls._misfit(cls(), block) is None]
        return f'{name}: {reason}; what fits: {", ".join([*fitting, "FullBlock"])}'

    def new_parameters(self, block: nn.Module) -> dict[str, nn.Parameter]:
        like = next(block.parameters())
        return {'scale': nn.Parameter(like.new_full((self._channels(block),), self.scale))}

    def _misfit(self, block: nn.Module) -> str | None:
        raise NotImplementedError

    def _channels(self, block: nn.Module) -> int:
        return next(iter(convolutions(block).values())).in_channels

    def __repr__(self) -> str:
        return f'{type(self).__name__}(scale={self.scale})'


def _misfit_of_convolutions(block: nn.Module) -> str | None:
    if not convolutions(block):
        return 'it has no convolution'
    return None if keeps_its_shape(block) else 'it changes the width or the stride'


@OPERATORS.register_module()
class DepthwiseBlock(LightOperator):
    r"""One depthwise convolution on the block's input, its kernels made from the block's spatial convolution.

    .. math:: h_{out} = h_{in} + γ ⊙ (\hat k * h_{in}), \qquad
        \hat k_c = \frac{\bar W_{o(c)}}{\lVert \bar W_{o(c)} \rVert}, \quad \bar W_o = \frac1i \sum_j W_{oj}

    with W the fused weight (o, i, k, k) of the block's (last) convolution with the largest kernel, its mean over the
    input channels brought to length 1, and :math:`o(c) = ⌊c·o/C⌋`. Identity and scale are part of the kernel, so that
    the layer *is* one ``Conv2d(C, C, k, groups=C)``; materialized it is just that.

    For blocks of convolutions (BasicBlock, Bottleneck, ResNeXt's, Res2Net's, ConvNeXt's, ...) that keep stride and
    width. FLOPs: :math:`2k^2C` per position, 72w for a Bottleneck of width w (C = 4w) against :math:`34w^2` of the
    block, 3.3 % at w = 64 and 0.4 % at w = 512; the kernel comes from few numbers. For backward it saves nothing but
    its input, which the block before has saved: what remains is its output, C numbers per position, which the next
    block saves, unless it is rebuilt; the removed Bottleneck saves 12w = 3C with frozen norm statistics.

    It drops: mixing of channels, norms, the activation. Kernels of unit length make it indifferent to the
    scale of the neighbours' weights, which norms leave undetermined.

    Args:
        scale: start of γ.

    Source: arXiv 2605.19533 ("computing layer"); the form is ours.
    """

    repeatable = True

    def __init__(self, scale: float = 0.0) -> None:
        super().__init__(scale)

    def needs(self, block: nn.Module) -> dict[str, Shape]:
        weight = convolutions(block)[_spatial(block)].weight
        return {f'{_spatial(block)}.weight': (len(weight), 1, *weight.shape[2:])}

    def read(self, tensor: Tensor, shape: Shape) -> Tensor:
        """The mean over input channels: fusions, which are linear maps of output channels, commute with it."""
        return tensor.mean(1, keepdim=True)

    def template(self, block: nn.Module) -> nn.Module:
        conv, channels = convolutions(block)[_spatial(block)], self._channels(block)
        with torch.device('meta'):
            return nn.Conv2d(channels, channels, conv.kernel_size, padding=same_padding(conv),
                             dilation=conv.dilation, groups=channels, bias=False)

    def weights(self, template: nn.Module, tensors: dict[str, Tensor],
                parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        [kernel] = tensors.values()
        scale = parameters['scale']
        kernel = _unit(kernel)
        identity = torch.zeros_like(kernel[:1])
        identity[..., kernel.shape[2] // 2, kernel.shape[3] // 2] = 1
        return {'weight': identity + scale.view(-1, 1, 1, 1) * stretch(kernel, len(scale))}

    def _misfit(self, block: nn.Module) -> str | None:
        reason = _misfit_of_convolutions(block)
        if reason is None and any(size % 2 == 0 for size in convolutions(block)[_spatial(block)].kernel_size):
            return f'{_spatial(block)} has a kernel of even size'
        return reason


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
        scale: start of γ.

    Raises:
        ValueError: ``width`` out of range.

    Source: arXiv 2605.19533 ("computing layer"); the form is ours.
    """

    repeatable = True

    def __init__(self, width: float = 0.0625, scale: float = 0.0) -> None:
        super().__init__(scale)
        if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width <= 1:
            raise ValueError(f'SlimBlock: width must be above 0 and at most 1, got {width!r}')
        self.width = width

    def needs(self, block: nn.Module) -> dict[str, Shape]:
        parts = mlp(block)
        if parts is None:
            names = [f'{name}.weight' for name in branch(block)]
        else:
            names = [f'{name}.{slot}' for name in (parts.norm, parts.expand)
                     for slot, _ in block.get_submodule(name).named_parameters()] + [f'{parts.project}.weight']
        return {name: tuple(parameter.shape)
                for name, parameter in zip(names, self.template(block).parameters(), strict=True)}

    def template(self, block: nn.Module) -> nn.Module:
        parts = mlp(block)
        with torch.device('meta'):
            if parts is None:
                return SlimConvolutions(list(branch(block).values()), self.width)
            norm, expand = block.get_submodule(parts.norm), block.get_submodule(parts.expand)
            return SlimMlp(parts.channels, _part(parts.hidden, self.width), expand.bias is not None, norm.eps,
                           norm.bias is not None, copy.deepcopy(parts.activation))

    def weights(self, template: nn.Module, tensors: dict[str, Tensor],
                parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        made = dict(zip(template.slots, tensors.values(), strict=True))
        if template.unit_length:
            made = {slot: _unit(tensor) * (1 if slot == template.slots[-1] else
                    math.sqrt(2)) for slot, tensor in made.items()}
        last = made[template.slots[-1]]
        made[template.slots[-1]] = parameters['scale'].view(-1, *[1] * (last.ndim - 1)) * last
        return made

    def _channels(self, block: nn.Module) -> int:
        parts = mlp(block)
        return super()._channels(block) if parts is None else parts.channels

    def _misfit(self, block: nn.Module) -> str | None:
        if mlp(block) is not None:
            return None
        reason = _misfit_of_convolutions(block)
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
        out = x
        for conv in self.convs[:-1]:
            out = F.relu(conv(out), inplace=True)
        return x + self.convs[-1](out)


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


@OPERATORS.register_module()
class PooledBlock(LightOperator):
    r"""The whole block on a coarser map.

    .. math:: h_{out} = h_{in} + γ ⊙ \mathrm{up}\big(B_i(\mathrm{pool}\,h_{in}; θ_i) - \mathrm{pool}\,h_{in}\big)

    with means over s × s positions for pool and bilinear interpolation for up, on all of the block's fused tensors.

    For blocks of convolutions that keep stride and width. FLOPs: :math:`1/s^2` of the block's (a bit more where s
    doesn't divide the map). For backward it saves :math:`1/s^2` of what the block saves and of C, and its output.

    It drops: resolution. Norms stay, so their running statistics have to be recalibrated as with ``FullBlock``.

    Args:
        stride: s, at least 2.
        scale: start of γ.

    Raises:
        ValueError: ``stride`` out of range.

    Source: arXiv 2605.19533 ("computing layer"); the form is ours.
    """

    def __init__(self, stride: int = 3, scale: float = 1.0) -> None:
        super().__init__(scale)
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 2:
            raise ValueError(f'PooledBlock: stride must be an integer of at least 2, got {stride!r}')
        self.stride = stride

    def template(self, block: nn.Module) -> nn.Module:
        return Pooled(block, self.stride)

    def weights(self, template: nn.Module, tensors: dict[str, Tensor],
                parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {'scale': parameters['scale']}

    def _misfit(self, block: nn.Module) -> str | None:
        if 'scale' in block._parameters:
            return 'it has a parameter of its own that is called scale'
        return _misfit_of_convolutions(block)

    def __repr__(self) -> str:
        return f'PooledBlock(stride={self.stride}, scale={self.scale})'


class Pooled(nn.Module):
    """A block on a coarser map, added to its input. See :class:`PooledBlock`.

    It has the block's own children, parameters and buffers under their own names, and ``scale``.
    """

    def __init__(self, block: nn.Module, stride: int) -> None:
        super().__init__()
        self._block = (block,)
        self._modules, self._parameters, self._buffers = block._modules, block._parameters, block._buffers
        self._non_persistent_buffers_set = block._non_persistent_buffers_set
        self.training = block.training
        self.stride = stride
        if hasattr(block, 'with_cp'):
            self.with_cp = block.with_cp
        self.register_parameter('scale', None)

    def forward(self, x: Tensor) -> Tensor:
        [block] = self._block
        block.training = self.training
        if hasattr(block, 'with_cp'):
            block.with_cp = self.with_cp
        coarse = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        change = (block(coarse) - coarse) * self.scale.view(-1, 1, 1)
        return x + F.interpolate(change, size=x.shape[-2:], mode='bilinear', align_corners=False)


@OPERATORS.register_module()
class Skip(LightOperator):
    r"""Nothing: :math:`h_{out} = h_{in}`. The yardstick: what removing the blocks would save, and what it costs in AP.

    It needs no tensors, learns nothing and saves nothing, so the fusion has no part in it.
    """

    def __init__(self) -> None:
        super().__init__(0)

    def needs(self, block: nn.Module) -> dict[str, Shape]:
        return {}

    def template(self, block: nn.Module) -> nn.Module:
        return Nothing()

    def new_parameters(self, block: nn.Module) -> dict[str, nn.Parameter]:
        return {}

    def weights(self, template: nn.Module, tensors: dict[str, Tensor],
                parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def _misfit(self, block: nn.Module) -> str | None:
        return _misfit_of_convolutions(block) if mlp(block) is None else None

    def __repr__(self) -> str:
        return 'Skip()'


class Nothing(nn.Module):
    """Gives its input back, whatever else it was given."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


LIGHT = (DepthwiseBlock, SlimBlock, PooledBlock)


def _part(channels: int, width: float, unit: int = 1) -> int:
    """About ``width`` of ``channels``, a multiple of ``unit``, at least one of these."""
    return min(channels, max(1, round(channels * width / unit)) * unit)


def _spatial(block: nn.Module) -> str:
    """The name of the convolution with the largest kernel, the last of these: a stage's first block has it as well."""
    convs = convolutions(block)
    return max(reversed(convs), key=lambda name: math.prod(convs[name].kernel_size))


def _unit(weight: Tensor) -> Tensor:
    """Each output channel's part brought to length 1; zeros stay zeros, in half precision, too."""
    return F.normalize(weight.flatten(1), dim=1, eps=torch.finfo(weight.dtype).tiny).view_as(weight)
