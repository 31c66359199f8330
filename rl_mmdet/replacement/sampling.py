r"""Unbiased estimates of a weight's gradient from a random part of a layer's input.

The positions of a layer's output are divided into K parts: every K-th token for a linear layer, every K-th row for a
1×1 convolution, every K-th strip of a few rows for other convolutions, whose strips see some more rows of the input.
So each part is spread over the whole map. With the part k drawn by torch's generator, :math:`k \sim U\{1 … K\}`,

.. math:: \widehat{∂L/∂W} = K \sum_{r ∈ R_k} g_r\, h_r^⊤, \qquad E\,\widehat{∂L/∂W} = \sum_r g_r\, h_r^⊤ = ∂L/∂W

with the output gradient g and the layer's input h, of which only the rows that part k saw have to be kept. One
combination is known exactly without the input, :math:`⟨∂L/∂W, W⟩ = ⟨g, W*h⟩`, and serves as control variate: the
estimate's component along W is exchanged for it (:func:`with_exact_part`). For RL-v1's :math:`W = aW_p + bW_n` it is
:math:`a\,∂L/∂a + b\,∂L/∂b`.

Source: ours; see docs/method.md, "Facts".
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvSettings:
    """How a convolution goes over its map: (height, width) each, with zeros around it."""
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> 'ConvSettings':
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def output_shape(self, x: torch.Size, weight: torch.Size) -> tuple[int, ...]:
        sizes = zip(x[2:], weight[2:], self.stride, self.padding, self.dilation, strict=True)
        return (x[0], weight[0], *((size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
                                   for size, kernel, stride, pad, dilation in sizes))


STRIP = 4
"""Rows per strip, where a map has enough of them: a strip of a 3×3 convolution sees half as many again."""


@dataclass(frozen=True)
class Part:
    """Every ``count``-th strip of ``strip`` rows of a convolution's output, from strip ``first`` on.

    Args:
        rows: of the output.
        sliced: each row sees just one row, so that all together are a slice of a map.
    """
    rows: int
    strip: int
    first: int
    count: int
    sliced: bool = False

    def strips(self) -> range:
        """The first rows of the strips."""
        return range(self.first * self.strip, self.rows, self.count * self.strip)

    def of_output(self, grad: Tensor) -> Tensor:
        """The part's rows of the output's gradient, the strips behind one another as examples of a batch."""
        if self.count == 1:
            return grad.contiguous(memory_format=format_of(grad))
        if self.sliced:
            return grad[..., self.first::self.count, :].contiguous(memory_format=format_of(grad))
        return torch.cat([_rows(grad, top, top + self.strip) for top in self.strips()])

    def of_input(self, h: Tensor, kernel: int, conv: ConvSettings) -> Tensor:
        """The rows of a convolution's input that they see, in the same order; zeros beyond the map's edge."""
        if self.count == 1:
            return h
        if self.sliced:
            rows = slice(self.first * conv.stride[0], self.rows * conv.stride[0], self.count * conv.stride[0])
            return h[..., rows, :].clone(memory_format=format_of(h))
        more = (self.strip - 1) * conv.stride[0] + conv.dilation[0] * (kernel - 1) + 1
        tops = [top * conv.stride[0] - conv.padding[0] for top in self.strips()]
        return torch.cat([_rows(h, top, top + more) for top in tops])


def pick_part(rows: int, kernel: int, conv: ConvSettings, parts: int) -> Part:
    """A random part of an output's rows, by torch's generator: activation checkpoints restore it.

    Args:
        rows: of the output.
        kernel: height of the convolution's kernel.
        conv: its settings.
        parts: K; there are fewer where there are fewer rows.
    """
    if parts == 1 or rows <= 1:
        return Part(rows, rows, 0, 1)
    sliced = kernel == 1 and conv.padding[0] == 0
    strip = 1 if sliced else max(1, min(STRIP, rows // parts))
    count = min(parts, -(-rows // strip))
    return Part(rows, strip, pick(count), count, sliced)


def format_of(tensor: Tensor) -> torch.memory_format:
    """Whether a map has its channels last in memory."""
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def pick(count: int) -> int:
    """A random number below ``count``; processes of a distributed run whose generators agree get different ones."""
    if count == 1:
        return 0
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return (int(torch.randint(count, ())) + rank) % count


def _rows(tensor: Tensor, top: int, bottom: int) -> Tensor:
    """Rows of a map, with zeros where there are none."""
    rows = tensor.shape[-2]
    inside = tensor[..., max(0, top):max(0, min(rows, bottom)), :]
    above = min(max(0, -top), bottom - top)
    return F.pad(inside, (0, 0, above, bottom - top - above - inside.shape[-2]))


def estimate(grad: Tensor, seen: Tensor, weight: Tensor, conv: ConvSettings, part: Part) -> Tensor:
    """An estimate of a convolution's weight gradient from a part of its output.

    Args:
        grad: of the whole output.
        seen: what :meth:`Part.of_input` found.
        weight: for its shape.
        conv, part: the convolution and the part.
    """
    padding = conv.padding if part.count == 1 else (0, conv.padding[1])
    stride = (1, conv.stride[1]) if part.sliced else conv.stride
    return torch.ops.aten.convolution_backward(
        part.of_output(grad), seen, weight, None, stride, padding, conv.dilation, False, (0, 0), conv.groups,
        (False, True, False))[1] * part.count


def input_gradient(grad: Tensor, weight: Tensor, shape: torch.Size, settings: ConvSettings) -> Tensor:
    """The gradient of a convolution's input of this shape."""
    like, weight = grad.new_empty(()).expand(shape), weight.contiguous(memory_format=format_of(grad))
    return torch.ops.aten.convolution_backward(
        grad, like, weight, None, settings.stride, settings.padding, settings.dilation, False, (0, 0),
        settings.groups, (True, False, False))[0]


def with_exact_part(estimate: Tensor, weight: Tensor, exact: Tensor) -> Tensor:
    r"""The estimate with its component along the weight as it is known.

    .. math:: \hat G + W\,\frac{t - ⟨\hat G, W⟩}{⟨W, W⟩}

    Its mean is that of the estimate, since :math:`E⟨\hat G, W⟩ = t`.

    Args:
        estimate: :math:`\hat G`, of the gradient of ``weight``.
        weight: W, output channels first.
        exact: t, :math:`⟨∂L/∂W, W⟩`, for the whole weight or for each output channel.
    """
    axes = tuple(range(exact.ndim, weight.ndim))
    weight, estimate = wide(weight), wide(estimate)
    size = weight.square().sum(axes, keepdim=True)
    missing = wide(exact).view_as(size) - (estimate * weight).sum(axes, keepdim=True)
    return estimate + weight * torch.where(size > 0, missing / size, 0)


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def inner(a: Tensor, b: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Inner product over some axes, summed in at least float32."""
    return (a * b).sum(axes, dtype=torch.promote_types(a.dtype, torch.float32))


def to_bits(mask: Tensor) -> Tensor:
    """Eight bools of a map in a byte, in the order of memory: shape ``(n,)``, ``(1, n)`` with the channels last."""
    last = format_of(mask) is torch.channels_last
    flat = mask.permute(0, 2, 3, 1).flatten() if last else mask.flatten()
    flat = F.pad(flat, (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    bits = (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)
    return bits[None] if last else bits


def positive(kept: Tensor, shape: torch.Size) -> Tensor:
    """Where a ReLU let something through, from its output, from bools or from bits."""
    if kept.dtype != torch.uint8:
        return kept > 0
    bits = (kept.flatten()[:, None] >> torch.arange(8, dtype=torch.uint8, device=kept.device) & 1).bool().flatten()
    bits = bits[:shape.numel()]
    if kept.ndim == 1:
        return bits.view(shape)
    batch, channels, height, width = shape
    return bits.view(batch, height, width, channels).permute(0, 3, 1, 2)
