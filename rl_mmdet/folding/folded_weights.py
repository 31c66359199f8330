"""The weights of many convolutions and the norms behind them, folded in a few tensor operations.

On a GPU every operation has to be launched, and a backbone has many small weights. Output channels whose weights are of
one length are rows of one matrix, whatever convolution they are of, so one product scales them all.
"""
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Pair(NamedTuple):
    """A convolution's weight and bias, γ, β and statistics of the norm behind it."""
    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float

    @property
    def kind(self) -> tuple:
        """Equal for pairs that can be folded together."""
        weight, bias, gamma, beta, mean, _, eps = self
        return (weight.dtype, weight.device, mean.dtype, eps, weight.requires_grad,
                None if bias is None else bias.requires_grad, None if gamma is None else gamma.requires_grad,
                None if beta is None else beta.requires_grad)

    @property
    def learns(self) -> bool:
        return any(tensor is not None and tensor.requires_grad for tensor in self[:4])

    @property
    def frozen(self) -> bool:
        """Whether all are parameters that don't learn, not tensors that were made for this run."""
        return all(tensor is None or isinstance(tensor, nn.Parameter) and not tensor.requires_grad
                   for tensor in self[:4])


def fold(pairs: Sequence[Pair], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """W' and b' of pairs of one kind, with gradient.

    Args:
        dtype: of W' and b'; with float16 b' is of single precision.
    """
    lengths = [pair.weight.numel() // pair.weight.size(0) for pair in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    *parts, means, variances, eps = zip(*[pairs[i] for i in order], strict=True)
    learnable = [None if part[0] is None else part for part in parts]
    outs = _Fold.apply([part is not None for part in learnable], (means, variances, eps[0]), dtype,
                       *chain(*filter(None, learnable)))
    found = dict(zip(order, zip(outs[:len(pairs)], outs[len(pairs):], strict=True), strict=True))
    return map(found.__getitem__, range(len(pairs)))


class _Fold(torch.autograd.Function):
    """From all weights, all biases, all γ and all β, where there are any, to all W' and all b'."""

    @staticmethod
    def forward(ctx: Any, there: Sequence[bool], norms: tuple, dtype: torch.dtype, *tensors: Tensor
                ) -> tuple[Tensor, ...]:
        means, variances, eps = norms
        count = len(means)
        starts = [sum(there[:i]) * count if there[i] else None for i in range(4)]
        weights = tensors[:count]
        bias, gamma, beta = (None if i is None else torch.cat(tensors[i:i + count]) for i in starts[1:])
        mean, var = torch.cat(means), torch.cat(variances)
        inverse = (var if var.dtype == torch.float64 else var.float()).add(eps).rsqrt_()
        scale = inverse if gamma is None else inverse * gamma
        offset = -mean if bias is None else bias - mean
        shift = scale * offset if beta is None else torch.addcmul(beta, scale, offset)
        rows = _Rows(weights)
        kernels = rows.views(rows.scale_(rows.joined(weights), scale).to(dtype))
        shifts = shift.to(torch.promote_types(shift.dtype, torch.float32) if dtype == torch.float16 else dtype)
        ctx.learns = [i is not None and ctx.needs_input_grad[3 + i] for i in starts]
        ctx.there, ctx.inverse, ctx.scale, ctx.offset, ctx.rows = there, inverse, scale, offset, rows
        for_weight, _, for_gamma, _ = ctx.learns
        if for_gamma:
            ctx.save_for_backward(*weights)
        if not (for_weight or for_gamma):
            ctx.mark_non_differentiable(*kernels)
        ctx.set_materialize_grads(False)
        return *kernels, *shifts.split(rows.channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        rows, scale = ctx.rows, ctx.scale
        channels = rows.channels
        count = len(channels)
        for_weight, for_bias, for_gamma, for_beta = ctx.learns
        found: list[Sequence[Tensor | None]] = [[None] * count for _ in range(4)]
        kernels, shifts = grads[:count], grads[count:]
        ran = [i for i in range(count) if shifts[i] is not None or kernels[i] is not None]
        shift = torch.cat([scale.new_zeros(size) if grad is None else grad
                           for size, grad in zip(channels, shifts, strict=True)])
        shift = shift.to(scale.dtype)
        if for_weight or for_gamma:
            flat = scale.new_empty(rows.size)
            views = rows.views(flat)
            into, given = [views[i] for i in ran], [kernels[i] for i in ran]
            torch._foreach_copy_(into, given)
            if for_gamma:
                torch._foreach_mul_(views, ctx.saved_tensors)
                found[2] = rows.sums(flat).addcmul_(shift, ctx.offset).mul_(ctx.inverse).split(channels)
            if for_weight:
                if for_gamma:
                    torch._foreach_copy_(into, given)
                rows.scale_(flat, scale)
                found[0] = views
        if for_bias:
            found[1] = (shift * scale).split(channels)
        if for_beta:
            found[3] = shift.split(channels)
        if len(ran) < count:
            found = [[part[i] if i in ran else None for i in range(count)] for part in found]
        return None, None, None, *chain(*(part for part, there in zip(found, ctx.there, strict=True) if there))


class _Rows:
    """Where weights lie as rows, one for each output channel, in one tensor."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.places: list[tuple[Sequence[int], Sequence[int], int]] = []
        self.channels: list[int] = []
        self.size = 0
        for weight in weights:
            shape = weight.shape
            self.places.append((shape, _stride(weight), self.size))
            self.channels.append(shape[0])
            self.size += weight.numel()
        self.groups = [(length, sum([shape[0] for shape, *_ in places]))
                       for length, places in groupby(self.places, lambda place: place[0][1:].numel())]

    def joined(self, weights: Sequence[Tensor]) -> Tensor:
        """The weights in one tensor."""
        return torch.cat([(weight if weight.is_contiguous() else weight.permute(0, 2, 3, 1)
                           if weight.is_contiguous(memory_format=torch.channels_last) else weight).reshape(-1)
                          for weight in weights])

    def views(self, flat: Tensor) -> list[Tensor]:
        """The weights that lie in it."""
        return [flat.as_strided(*place) for place in self.places]

    def matrices(self, flat: Tensor) -> list[Tensor]:
        """Rows of one length each."""
        parts = flat.split([length * number for length, number in self.groups])
        return [part.view(number, length) for part, (length, number) in zip(parts, self.groups, strict=True)]

    def scale_(self, flat: Tensor, scale: Tensor) -> Tensor:
        """Multiply every row with a number."""
        scales = scale[:, None].split([number for _, number in self.groups])
        torch._foreach_mul_(self.matrices(flat), scales)
        return flat

    def sums(self, flat: Tensor) -> Tensor:
        """The sum of every row."""
        return torch.cat([matrix.sum(1) for matrix in self.matrices(flat)])


def _stride(weight: Tensor) -> Sequence[int]:
    if weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last):
        return weight.stride()
    return weight.contiguous().stride()


class AddShift(torch.autograd.Function):
    """Add b' of single precision in place: the sum over its gradient may be beyond the largest number in float16."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, shift: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        return out.add_(shift[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return grad, grad.sum((0, 2, 3), dtype=torch.float32) if ctx.needs_input_grad[1] else None
