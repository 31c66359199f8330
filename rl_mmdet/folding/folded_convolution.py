"""What folds: the weights of many convolutions and norms in a few tensor operations, and the convolution on them.

A convolution may get its folded weight alone or together with others (:class:`Batch`): on a GPU every tensor operation
has to be launched, and a backbone has many small weights. Output channels whose weights are of one length are rows of
one matrix, whatever convolution they are of, so one product scales them all.
"""
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BIG = 1_000_000
"""A weight of this size is scaled alone: to join it with others takes longer than to launch an operation."""


class Settings(NamedTuple):
    """How a convolution goes over its map: in the order in which torch's functions take it."""
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def backward(self, grad: Tensor, inputs: Tensor, kernel: Tensor, wanted: tuple[bool, bool]
                 ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the convolution's input and weight, those that are wanted."""
        return torch.ops.aten.convolution_backward(
            grad, inputs, kernel, None, self.stride, self.padding, self.dilation, False, (0, 0), self.groups,
            (*wanted, False))[:2]


class Pair(NamedTuple):
    """The tensors of a convolution and of the norm behind it."""
    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    var: Tensor

    @property
    def kind(self) -> tuple:
        """Equal for pairs that can be in one batch."""
        return (self.weight.device, self.weight.dtype, self.mean.dtype,
                *(tensor is None or tensor.requires_grad for tensor in self[:4]),
                *(tensor is None for tensor in self[1:4]))


class Folded(NamedTuple):
    """W' and b' of a convolution: in the dtype in which it computes, b' also in float32 or better, for its gradient."""
    kernel: Tensor
    shift: Tensor
    low_shift: Tensor


class Batch:
    """Pairs of one kind that are folded together, in forward and again in backward: W' isn't kept.

    Args:
        pairs: sorted by their weights, see :func:`in_order`.
        eps: ε of their norms.
        dtype: of W'.

    Attributes:
        scale: γ/σ of all their channels.
    """

    def __init__(self, pairs: Sequence[Pair], eps: float, dtype: torch.dtype) -> None:
        self.pairs, self.eps, self.dtype = pairs, eps, dtype
        self.versions = self._versions()
        self.scale: Tensor | None = None
        self._kernels: list[Tensor | None] = [None] * len(pairs)

    def fold(self) -> list[Folded]:
        """W' and b' of every pair, with gradient."""
        count, flat = len(self.pairs), [tensor for tensors in zip(*self.pairs, strict=True) for tensor in tensors]
        outs = _Fold.apply(self, *flat)
        return [Folded(*each) for each in zip(*(outs[i:i + count] for i in range(0, 3 * count, count)), strict=True)]

    def kernels(self) -> list[Tensor]:
        """W' of every pair."""
        kernels: list[Tensor] = []
        for weights, channels in _groups([pair.weight for pair in self.pairs]):
            rows = _joined_rows(weights, weights)
            out = torch.empty(rows.shape, dtype=self.dtype, device=rows.device)
            kernels += _separated(torch.mul(rows, self.scale[channels, None], out=out), weights)
        return kernels

    def kernel_again(self, index: int) -> Tensor:
        """W' of one pair, for backward; those of the others are made with it and stay until they are asked for."""
        if self._kernels[index] is None:
            if self.versions != self._versions():
                raise RuntimeError('fold_norm: a weight or statistic of a folded convolution or norm was modified by '
                                   'an inplace operation between forward and backward')
            self._kernels = self.kernels()
        kernel, self._kernels[index] = self._kernels[index], None
        return kernel

    def _versions(self) -> list[int]:
        return [tensor._version for pair in self.pairs for tensor in pair if tensor is not None]


class _Fold(torch.autograd.Function):
    """From all weights, all biases, γ, β, means and variances of a batch to all W', all b', and b' in W's dtype."""

    @staticmethod
    def forward(ctx: Any, batch: Batch, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        count = len(batch.pairs)
        with torch.autocast(tensors[0].device.type, enabled=False):
            weights, *parts = (tensors[i:i + count] for i in range(0, len(tensors), count))
            bias, gamma, beta, mean, var = (None if part[0] is None else _joined(part) for part in parts)
            inverse = (var if var.dtype == torch.float64 else var.float()).add(batch.eps).rsqrt()
            batch.scale = inverse if gamma is None else inverse * gamma
            offset = -mean if bias is None else bias - mean
            shift = batch.scale * offset
            shift = shift if beta is None else shift + beta
            kernels, channels = batch.kernels(), [len(weight) for weight in weights]
            low = shift.to(batch.dtype) if shift.dtype != batch.dtype else shift.detach()
        ctx.learns = [ctx.needs_input_grad[1 + i * count] for i in range(4)]
        ctx.inverse, ctx.scale, ctx.offset, ctx.channels = inverse, batch.scale, offset, channels
        for_weight, _, for_gamma, _ = ctx.learns
        ctx.save_for_backward(*(weights if for_weight or for_gamma else ()))
        shifts, lows = shift.split(channels), low.split(channels)
        constant = [] if for_weight or for_gamma else kernels
        ctx.mark_non_differentiable(*constant, *lows)
        ctx.set_materialize_grads(False)
        return *kernels, *shifts, *lows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        weights, scale, count = ctx.saved_tensors, ctx.scale, len(ctx.channels)
        for_weight, for_bias, for_gamma, for_beta = ctx.learns
        found: list[Sequence[Tensor | None]] = [[None] * count for _ in range(4)]
        with torch.autocast(scale.device.type, enabled=False):
            grad_shift = _joined([scale.new_zeros(size) if grad is None else grad
                                  for size, grad in zip(ctx.channels, grads[count:2 * count], strict=True)])
            grad_kernels = iter(grads)
            grad_weights: list[Tensor] = []
            products: list[Tensor] = []
            for group, channels in _groups(weights):
                rows = _joined_rows([torch.zeros_like(weight) if grad is None else grad
                                     for weight, grad in zip(group, grad_kernels, strict=False)], group)
                joined = len(group) > 1
                if for_gamma:
                    values = _joined_rows(group, group).to(scale.dtype)
                    products.append(torch.mul(rows, values, out=values if joined else None).sum(1))
                    del values
                if for_weight:
                    out = rows if joined and rows.dtype == scale.dtype else None
                    grad_weights += _separated(torch.mul(rows, scale[channels, None], out=out), group)
            if for_weight:
                found[0] = grad_weights
            if for_bias:
                found[1] = (grad_shift * scale).split(ctx.channels)
            if for_gamma:
                found[2] = (ctx.inverse * (_joined(products) + grad_shift * ctx.offset)).split(ctx.channels)
            if for_beta:
                found[3] = grad_shift.split(ctx.channels)
        ran = [grads[i] is not None or grads[count + i] is not None for i in range(count)]
        return None, *(grad if there else None for part in found for grad, there in zip(part, ran, strict=True)
                       ), *[None] * 2 * count


class FoldedConvolution(torch.autograd.Function):
    """A convolution with W' and b'.

    Args:
        x: in W's dtype.
        folded: its three tensors.
        conv: the convolution's settings.
        again: makes W' in backward; None keeps it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, shift: Tensor, low_shift: Tensor, conv: Settings,
                again: Callable[[], Tensor] | None) -> Tensor:
        ctx.conv, ctx.again, ctx.shift_dtype = conv, again, shift.dtype
        ctx.shapes = x.shape, kernel.shape
        for_x, for_kernel, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_kernel else None, kernel if for_x and again is None else None)
        return torch.conv2d(x, kernel, low_shift, *conv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, kernel = ctx.saved_tensors
        for_x, for_kernel, for_shift, *_ = ctx.needs_input_grad
        grad_x = grad_kernel = None
        with torch.autocast(grad.device.type, enabled=False):
            if for_x and kernel is None:
                kernel = ctx.again()
            if for_x or for_kernel:
                # of what there is no need for, only the shape matters
                x = grad.new_empty(()).expand(ctx.shapes[0]) if x is None else x
                kernel = grad.new_empty(ctx.shapes[1]) if kernel is None else kernel
                if not for_kernel:
                    channels_last = grad.is_contiguous(memory_format=torch.channels_last)
                    kernel = kernel.contiguous(
                        memory_format=torch.channels_last if channels_last else torch.contiguous_format)
                grad_x, grad_kernel = ctx.conv.backward(grad, x, kernel, (for_x, for_kernel))
            grad_shift = grad.sum((0, 2, 3), dtype=ctx.shift_dtype) if for_shift else None
        return grad_x, grad_kernel, grad_shift, None, None, None


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _last(weight: Tensor) -> bool:
    """Whether an output channel's weights lie with the input channels last."""
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _groups(weights: Sequence[Tensor]) -> Iterator[tuple[Sequence[Tensor], slice]]:
    """Weights whose output channels are of one length, big ones alone, and where these channels are among all."""
    def kind(numbered: tuple[int, Tensor]) -> tuple[int, int]:
        index, weight = numbered
        return weight[0].numel(), index if weight.numel() >= BIG else -1

    channel = 0
    for _, same in groupby(enumerate(weights), kind):
        group = [weight for _, weight in same]
        size = sum(map(len, group))
        yield group, slice(channel, channel + size)
        channel += size


def in_order(weight: Tensor) -> tuple[int, int]:
    """A key for sorting: how many weights an output channel has, then how many there are."""
    return weight[0].numel(), weight.numel()


def _joined_rows(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Tensors of these weights' shapes as one row for each output channel, in the order in which the weight lies."""
    return _joined([(tensor.permute(0, 2, 3, 1) if _last(weight) else tensor).reshape(len(tensor), -1)
                    for tensor, weight in zip(tensors, weights, strict=True)])


def _separated(rows: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The reverse."""
    parts = zip(rows.split([len(weight) for weight in weights]), weights, strict=True)
    return [part.view(weight.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) if _last(weight)
            else part.view(weight.shape) for part, weight in parts]
