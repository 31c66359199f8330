r"""A block of convolutions with BatchNorm in eval mode, run by a function that keeps little for backward.

A detached replaced block owns no weights, only the fusion's few parameters φ. They need the gradient of the block's
weights only in contraction with :math:`∂W/∂φ`, so an unbiased estimate of it is enough, from a part of the rows of each
convolution's input (:mod:`~rl_mmdet.replacement.sampling`). The gradient of the block's input is exact. BatchNorm in
eval mode is folded into the weights before it, :math:`W' = Wγ/σ, b' = β + γ(c - μ)/σ`. Kept for backward are

- the block's input, which the ReLU of the block before keeps anyway;
- one part of each further convolution's input, and a bool per number of it, for the ReLU;
- the output, which the block behind keeps anyway. With ``rebuild`` the whole input of the last convolution instead,
  from which the output is made again, and bits in place of bools, for the last ReLU, too.

With ``recompute`` it is the input alone, from which all is computed once more when the output is needed.

Source: ours; see docs/method.md, "Facts".
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .recipe import Folded, Job, contract
from .sampling import (
    ConvSettings,
    estimate,
    inner,
    input_gradient,
    positive,
    to_bits,
    wide,
    with_exact_part,
)


class FoldedBlock(torch.autograd.Function):
    """See the module's text. Inputs: the job, how many fusion parameters there are, x, these, and tensors to watch."""

    @staticmethod
    def forward(ctx: Any, job: Job, count: int, x: Tensor, *tensors: Tensor) -> Tensor:
        device = x.device.type
        ctx.job, ctx.count, ctx.x_dtype = job, count, x.dtype
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        folded = _fold(job, [tensor.detach() for tensor in tensors[:count]], ctx.dtype)
        *inputs, out = _forward(x, folded, job.convs)
        kernels = [weight.shape[2] for weight, _ in folded]
        ctx.parts, ctx.shapes = job.pick(out.shape[-2], kernels), [h.shape for h in (*inputs, out)]
        if job.memory == 'recompute':
            ctx.whole = set(range(len(inputs)))
            ctx.save_for_backward(*tensors, x)
            return out
        rebuild = job.memory == 'rebuild'
        ctx.whole = {0} if job.keep_input and ctx.dtype == x.dtype else set()
        masks = [to_bits(h > 0) if rebuild else h > 0 for h in inputs[1:]] + [to_bits(out > 0) if rebuild else out]
        if rebuild:
            ctx.whole.add(len(inputs) - 1)
            job.inner = inputs[-1:]
            masks[-2] = inputs[-1]
        kept = [h if index in ctx.whole else part.of_input(h, kernel, conv) for index, (h, part, kernel, conv) in
                enumerate(zip(inputs, ctx.parts, kernels, job.convs, strict=True))]
        ctx.save_for_backward(*tensors, *kept, *masks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        job, layers, saved = ctx.job, len(ctx.parts), ctx.saved_tensors
        with torch.enable_grad():
            parameters = [tensor.detach().requires_grad_() for tensor in saved[:ctx.count]]
            folded = job.fold(parameters)
        used = [(weight.detach().to(ctx.dtype), bias.detach().to(ctx.dtype)) for weight, bias in folded]
        if job.memory == 'recompute':
            *kept, out = job.take_inner() or _forward(saved[-1], used, job.convs)
            masks = [*kept[1:], out]
        else:
            kept, masks = saved[-2 * layers:-layers], saved[-layers:]
        grad = grad.to(ctx.dtype) * positive(masks[-1], ctx.shapes[-1])
        shortcut, estimates, bias_gradients, exact = grad, [], [], None
        for index in reversed(range(layers)):
            conv, part, (weight, bias), h = job.convs[index], ctx.parts[index], used[index], kept[index]
            seen = part.of_input(h, weight.shape[2], conv) if index in ctx.whole else h
            estimates.insert(0, estimate(grad, seen, weight, conv, part))
            bias_gradients.insert(0, grad.sum((0, 2, 3)))
            if index == layers - 1 and index not in ctx.whole and 0 in ctx.whole:
                exact = inner(grad, masks[-1] - kept[0], (0, 2, 3)) - wide(bias_gradients[0]) * bias
            if index or ctx.needs_input_grad[2]:
                grad = input_gradient(grad, weight, ctx.shapes[index], conv)
            if index == layers - 1 and index in ctx.whole:
                exact = inner(grad, h, (0, 1, 2, 3))
            if index:
                grad = grad * positive(masks[index - 1], ctx.shapes[index])
        if exact is not None and job.parts > 1:
            _steer_(estimates, used, bias_gradients, exact)
        gradients = contract(dict(enumerate(tensor for pair in folded for tensor in pair)), dict(enumerate(
            g for pair in zip(estimates, bias_gradients, strict=True) for g in pair)), parameters)
        input_grad = (grad + shortcut).to(ctx.x_dtype) if ctx.needs_input_grad[2] else None
        return None, None, input_grad, *gradients, *[None] * (len(ctx.needs_input_grad) - 3 - ctx.count)

    @staticmethod
    def output_again(job: Job, x: Tensor, parameters: list[Tensor]) -> Tensor:
        """The output from the input, and from the last convolution's where that was kept."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        folded = _fold(job, parameters, dtype)
        if job.memory == 'recompute':
            job.inner = _forward(x, folded, job.convs)
            return job.inner[-1]
        return _forward(x, folded[-1:], job.convs[-1:], job.inner[-1])[-1]


def _fold(job: Job, parameters: list[Tensor], dtype: torch.dtype) -> Folded:
    return [(weight.to(dtype), bias.to(dtype)) for weight, bias in job.fold(parameters)]


def _forward(x: Tensor, folded: Folded, convs: list[ConvSettings], start: Tensor | None = None) -> list[Tensor]:
    """Inputs of all convolutions, the first of which is x or ``start``, and the output; in the weights' dtype."""
    x = x.to(folded[0][0].dtype)
    inputs = [x if start is None else start]
    with torch.autocast(x.device.type, enabled=False):
        for index, ((weight, bias), conv) in enumerate(zip(folded, convs, strict=True)):
            out = conv.run(inputs[-1], weight, bias)
            inputs.append(F.relu_(out if index < len(folded) - 1 else out.add_(x)))
    return inputs


def _steer_(estimates: list[Tensor], used: Folded, bias_gradients: list[Tensor], exact: Tensor) -> None:
    r"""Give every estimate its exact part, from the last convolution's.

    .. math:: ⟨∂L/∂W_l, W_l⟩ = ⟨∂L/∂y_l, y_l⟩ - ⟨∂L/∂b_l, b_l⟩, \qquad
        ⟨∂L/∂y_l, y_l⟩ = ⟨∂L/∂h_{l+1}, h_{l+1}⟩ = ⟨∂L/∂W_{l+1}, W_{l+1}⟩

    with :math:`y_l = W_l * h_l + b_l` and :math:`h_{l+1} = σ(y_l)`: a ReLU changes y only where its gradient is 0.
    """
    for index in reversed(range(len(estimates))):
        weight, bias = used[index]
        if index < len(estimates) - 1:
            exact = exact.sum() - inner(bias_gradients[index], bias, (0,))
        estimates[index] = with_exact_part(estimates[index], weight, exact)
