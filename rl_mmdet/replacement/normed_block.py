r"""A block of convolutions with norms that look at the batch, run by a function that keeps little for backward.

As in :mod:`~rl_mmdet.replacement.folded_block`, only the gradients of the convolutions' weights are estimated; those
of the input and of the norms are exact. For BatchNorm that trains and GroupNorm. Kept for backward are

- the block's input, which the ReLU of the block before keeps anyway;
- the output of each convolution, from which norms and ReLUs are computed again;
- the output, which the block behind keeps anyway; with ``rebuild`` a bit per number of it.

With ``recompute`` it is the input alone, from which all is computed once more when the output is needed, without
another update of running statistics.

Source: ours; see docs/method.md, "Facts".
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .recipe import Job, add_contracted_, affine, autocast_now, norm_again
from .sampling import estimate, inner, input_gradient, positive, to_bits, wide, with_exact_part


class NormedBlock(torch.autograd.Function):
    """See the module's text. Inputs as those of :class:`FoldedBlock`."""

    @staticmethod
    def forward(ctx: Any, job: Job, count: int, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.job, ctx.count, ctx.autocast = job, count, autocast_now(x.device.type)

        def norm(index: int, z: Tensor, weights: dict[str, Tensor]) -> Tensor:
            name = job.recipe.norms[index]
            return functional_call(job.block.get_submodule(name), affine(weights, name), (z,))

        *outputs, out = _run(job, x, [tensor.detach() for tensor in tensors[:count]], norm)
        ctx.parts, ctx.x_shape, ctx.shape = job.pick(out.shape[-2]), x.shape, out.shape
        ctx.whole = job.keep_input or job.memory == 'recompute'
        if job.memory == 'recompute':
            ctx.save_for_backward(*tensors, x)
            return out
        kept = x if ctx.whole else ctx.parts[0].of_input(x, job.kernels[0], job.convs[0])
        job.inner = outputs[-1:] if job.memory == 'rebuild' else None
        ctx.save_for_backward(*tensors, kept, *outputs, to_bits(out > 0) if job.memory == 'rebuild' else out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        job, layers, saved = ctx.job, len(ctx.parts), ctx.saved_tensors
        parameters = [tensor.detach().requires_grad_() for tensor in saved[:ctx.count]]
        if job.memory == 'recompute':
            x = saved[-1]
            with ctx.autocast():
                *outputs, mask = job.take_inner() or _run(job, x, saved[:ctx.count], partial(_norm_again, job))
        else:
            x, outputs, mask = saved[-layers - 2], saved[-layers - 1:-1], saved[-1]
        grad = grad * positive(mask, ctx.shape)
        shortcut, gradients, step = grad, [None] * ctx.count, _norm_step(ctx, layers - 1, outputs, parameters)
        for index in reversed(range(layers)):
            tensors, z, leaves, normed = step
            grad, *given = torch.autograd.grad(normed, (z, *leaves.values()), grad.to(normed.dtype))
            found = dict(zip(leaves, given, strict=True))
            step = _norm_step(ctx, index - 1, outputs, parameters) if index else None
            h = F.relu(step[-1].detach()) if index else x
            found |= _conv_gradients(ctx, index, grad, z.detach(), h.to(z.dtype), tensors)
            add_contracted_(gradients, [tensors[name] for name in found], list(found.values()), parameters)
            if index or ctx.needs_input_grad[2]:
                weight = tensors[f'{job.recipe.convs[index]}.weight'].detach().to(z.dtype)
                grad = input_gradient(grad, weight, h.shape if index else ctx.x_shape, job.convs[index])
            if index:
                grad = grad * (h > 0)
        input_grad = (grad.to(x.dtype) + shortcut).to(x.dtype) if ctx.needs_input_grad[2] else None
        return None, None, input_grad, *gradients, *[None] * (len(ctx.needs_input_grad) - 3 - ctx.count)

    @staticmethod
    def output_again(job: Job, x: Tensor, parameters: list[Tensor]) -> Tensor:
        """The output from the input, and from the last convolution's output where that was kept."""
        if job.memory == 'recompute':
            job.inner = _run(job, x, parameters, partial(_norm_again, job))
            return job.inner[-1]
        last = len(job.convs) - 1
        return F.relu(_norm_again(job, last, job.inner[-1], job.tensors(last, parameters)) + x)


def _run(job: Job, x: Tensor, parameters: list[Tensor],
         norm: Callable[[int, Tensor, dict[str, Tensor]], Tensor]) -> list[Tensor]:
    """Outputs of all convolutions, and the block's."""
    return job.recipe.steps(job.block, lambda index: job.tensors(index, parameters), norm, x)


def _norm_again(job: Job, index: int, z: Tensor, weights: dict[str, Tensor]) -> Tensor:
    name = job.recipe.norms[index]
    return norm_again(job.block.get_submodule(name), job.training[index], z, **affine(weights, name))


def _norm_step(ctx: Any, index: int, outputs: list[Tensor], parameters: list[Tensor]) -> tuple:
    """A layer's tensors; its norm run again: its input, its parameters as leaves, and its output, which has a graph."""
    name = ctx.job.recipe.norms[index]
    with torch.enable_grad(), ctx.autocast():
        tensors, z = ctx.job.tensors(index, parameters), outputs[index].detach().requires_grad_()
        leaves = {f'{name}.{slot}': tensor.detach().requires_grad_() for slot, tensor in affine(tensors, name).items()}
        normed = _norm_again(ctx.job, index, z, leaves)
    return tensors, z, leaves, normed


def _conv_gradients(ctx: Any, index: int, grad: Tensor, z: Tensor, h: Tensor, tensors: dict[str, Tensor]
                    ) -> dict[str, Tensor]:
    """The estimate for a convolution's weight, and its bias's gradient; h is its input, z its output."""
    name, job = ctx.job.recipe.convs[index], ctx.job
    weight, bias = tensors[f'{name}.weight'].detach().to(z.dtype), tensors.get(f'{name}.bias')
    conv, part = job.convs[index], ctx.parts[index]
    seen = part.of_input(h, job.kernels[index], conv) if index > 0 or ctx.whole else h
    found = estimate(grad, seen, weight, conv, part)
    exact, gradients = inner(grad, z, (0, 2, 3)), {}
    if bias is not None:
        gradients[f'{name}.bias'] = grad.sum((0, 2, 3))
        exact = exact - wide(gradients[f'{name}.bias']) * bias.detach()
    return gradients | {f'{name}.weight': with_exact_part(found, weight, exact) if job.parts > 1 else found}
