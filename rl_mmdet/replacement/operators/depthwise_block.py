"""RL-v2: one depthwise convolution in the place of a block of convolutions."""
import math

import torch
from torch import Tensor, nn

from ..block_structure import convolutions, same_padding
from ..registry import OPERATORS
from ..resize import Shape, stretch
from .light_operator import ScaledOperator, misfit_of_convolutions, unit_length


@OPERATORS.register_module()
class DepthwiseBlock(ScaledOperator):
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
        conv, channels = convolutions(block)[_spatial(block)], self.channels(block)
        with torch.device('meta'):
            return nn.Conv2d(channels, channels, conv.kernel_size, padding=same_padding(conv),
                             dilation=conv.dilation, groups=channels, bias=False)

    def weights(self, template: nn.Module, tensors: dict[str, Tensor],
                parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        [kernel] = tensors.values()
        scale = parameters['scale']
        kernel = scale.view(-1, 1, 1, 1) * stretch(unit_length(kernel), len(scale))
        kernel[..., kernel.shape[2] // 2, kernel.shape[3] // 2].add_(1)  # the identity
        return {'weight': kernel}

    def misfit(self, block: nn.Module) -> str | None:
        reason = misfit_of_convolutions(block)
        if reason is None and any(size % 2 == 0 for size in convolutions(block)[_spatial(block)].kernel_size):
            return f'{_spatial(block)} has a kernel of even size'
        return reason


def _spatial(block: nn.Module) -> str:
    """The name of the convolution with the largest kernel, the last of these: a stage's first block has it as well."""
    convs = convolutions(block)
    return max(reversed(convs), key=lambda name: math.prod(convs[name].kernel_size))
