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

The control variate of :mod:`~rl_mmdet.replacement.sampling` goes from layer to layer: with
:math:`y_l = W_l * h_l + b_l` and :math:`h_{l+1} = σ(y_l)`

.. math:: ⟨∂L/∂W_l, W_l⟩ = ⟨∂L/∂y_l, y_l⟩ - ⟨∂L/∂b_l, b_l⟩, \qquad
    ⟨∂L/∂y_l, y_l⟩ = ⟨∂L/∂h_{l+1}, h_{l+1}⟩ = ⟨∂L/∂W_{l+1}, W_{l+1}⟩

since a ReLU changes y only where its gradient is 0; the last y is the output less the input.

Source: ours; see docs/method.md, "Facts".
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .recipe import Job, add_contracted_
from .sampling import estimate, inner, input_gradient, positive, to_bits, wide, with_exact_part


class FoldedBlock(torch.autograd.Function):
    """See the module's text. Inputs: the job, how many fusion parameters there are, x, these, and tensors to watch."""

    @staticmethod
    def forward(ctx: Any, job: Job, count: int, x: Tensor, *tensors: Tensor) -> Tensor:
        device = x.device.type
        ctx.job, ctx.count, ctx.x_dtype = job, count, x.dtype
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        *inputs, out = _run(job, [tensor.detach() for tensor in tensors[:count]], x, ctx.dtype)
        ctx.parts, ctx.shapes = job.pick(out.shape[-2]), [h.shape for h in (*inputs, out)]
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
                enumerate(zip(inputs, ctx.parts, job.kernels, job.convs, strict=True))]
        ctx.save_for_backward(*tensors, *kept, *masks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        job, layers, saved = ctx.job, len(ctx.parts), ctx.saved_tensors
        parameters = [tensor.detach().requires_grad_() for tensor in saved[:ctx.count]]
        if job.memory == 'recompute':
            *kept, out = job.take_inner() or _run(job, saved[:ctx.count], saved[-1], ctx.dtype)
            masks = [*kept[1:], out]
        else:
            kept, masks = saved[-2 * layers:-layers], saved[-layers:]
        grad = grad.to(ctx.dtype) * positive(masks[-1], ctx.shapes[-1])
        shortcut, exact, gradients = grad, None, [None] * ctx.count
        if layers - 1 not in ctx.whole and 0 in ctx.whole:  # <dL/dy, y> with y = W * h + b
            exact = inner(grad, masks[-1] - kept[0], (0, 2, 3))
        for index in reversed(range(layers)):
            with torch.enable_grad():
                folded = job.fold(index, parameters)
            weight, bias = (tensor.detach().to(ctx.dtype) for tensor in folded)
            conv, part, h = job.convs[index], ctx.parts[index], kept[index]
            seen = part.of_input(h, job.kernels[index], conv) if index in ctx.whole else h
            estimated, bias_gradient = estimate(grad, seen, weight, conv, part), grad.sum((0, 2, 3))
            if index or ctx.needs_input_grad[2]:
                grad = input_gradient(grad, weight, ctx.shapes[index], conv)
            if index == layers - 1 and index in ctx.whole and (index or ctx.needs_input_grad[2]):
                exact = inner(grad, h, (0, 1, 2, 3))
            elif exact is not None:
                product = wide(bias_gradient) * bias
                exact = exact - (product if exact.ndim else product.sum())
            if exact is not None:
                estimated = with_exact_part(estimated, weight, exact) if job.parts > 1 else estimated
                exact = exact.sum()  # <dL/dW, W>, which is <dL/dh, h> and so <dL/dy, y> of the layer before
            add_contracted_(gradients, folded, [estimated, bias_gradient], parameters)
            if index:
                grad = grad * positive(masks[index - 1], ctx.shapes[index])
        input_grad = (grad + shortcut).to(ctx.x_dtype) if ctx.needs_input_grad[2] else None
        return None, None, input_grad, *gradients, *[None] * (len(ctx.needs_input_grad) - 3 - ctx.count)

    @staticmethod
    def output_again(job: Job, x: Tensor, parameters: list[Tensor]) -> Tensor:
        """The output from the input, and from the last convolution's where that was kept."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if job.memory == 'recompute':
            job.inner = _run(job, parameters, x, dtype)
            return job.inner[-1]
        return _run(job, parameters, x, dtype, job.inner[-1])[-1]


def _run(job: Job, parameters: list[Tensor], x: Tensor, dtype: torch.dtype, last: Tensor | None = None
         ) -> list[Tensor]:
    """Inputs of all convolutions, or of the last one, where that is given, and the output."""
    x = x.to(dtype)
    inputs, end = [x if last is None else last], len(job.convs) - 1
    with torch.autocast(x.device.type, enabled=False):
        for index in range(0 if last is None else end, end + 1):
            weight, bias = job.fold(index, parameters)
            out = job.convs[index].run(inputs[-1], weight.to(dtype), bias.to(dtype))
            inputs.append(F.relu_(out.add_(x) if index == end else out))
    return inputs
