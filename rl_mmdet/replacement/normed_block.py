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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .recipe import Job, affine, autocast_now, contract, norm_again
from .sampling import estimate, inner, input_gradient, positive, to_bits, wide, with_exact_part


class NormedBlock(torch.autograd.Function):
    """See the module's text. Inputs as those of :class:`FoldedBlock`."""

    @staticmethod
    def forward(ctx: Any, job: Job, count: int, x: Tensor, *tensors: Tensor) -> Tensor:
        weights = job.weights([tensor.detach() for tensor in tensors[:count]])
        ctx.job, ctx.count, ctx.autocast = job, count, autocast_now(x.device.type)

        def norm(index: int, z: Tensor) -> Tensor:
            name = job.recipe.norms[index]
            return functional_call(job.block.get_submodule(name), affine(weights, name), (z,))

        *outputs, out = _forward(job, x, weights, norm)
        kernels = [weights[f'{conv}.weight'].shape[2] for conv in job.recipe.convs]
        ctx.parts, ctx.x_shape, ctx.shape = job.pick(out.shape[-2], kernels), x.shape, out.shape
        ctx.whole = job.keep_input or job.memory == 'recompute'
        if job.memory == 'recompute':
            ctx.save_for_backward(*tensors, x)
            return out
        kept = x if ctx.whole else ctx.parts[0].of_input(x, kernels[0], job.convs[0])
        job.inner = outputs[-1:] if job.memory == 'rebuild' else None
        ctx.save_for_backward(*tensors, kept, *outputs, to_bits(out > 0) if job.memory == 'rebuild' else out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        job, layers, saved = ctx.job, len(ctx.parts), ctx.saved_tensors
        with torch.enable_grad():
            parameters = [tensor.detach().requires_grad_() for tensor in saved[:ctx.count]]
            weights = job.weights(parameters)
        if job.memory == 'recompute':
            x = saved[-1]
            with ctx.autocast():
                *outputs, mask = job.take_inner() or _run_again(job, x, {n: t.detach() for n, t in weights.items()})
        else:
            x, outputs, mask = saved[-layers - 2], saved[-layers - 1:-1], saved[-1]
        grad = grad * positive(mask, ctx.shape)
        shortcut, gradients, step = grad, {}, _norm_step(ctx, layers - 1, outputs, weights)
        for index in reversed(range(layers)):
            z, names, leaves, normed = step
            grad, *given = torch.autograd.grad(normed, (z, *leaves), grad.to(normed.dtype))
            gradients |= zip(names, given, strict=True)
            step = _norm_step(ctx, index - 1, outputs, weights) if index else None
            h = F.relu(step[-1].detach()) if index else x
            weight = weights[f'{job.recipe.convs[index]}.weight'].detach().to(z.dtype)
            gradients |= _conv_gradients(ctx, index, grad, z.detach(), h.to(z.dtype), weights)
            if index or ctx.needs_input_grad[2]:
                grad = input_gradient(grad, weight, h.shape if index else ctx.x_shape, job.convs[index])
            if index:
                grad = grad * (h > 0)
        gradients = contract({name: weights[name] for name in gradients}, gradients, parameters)
        input_grad = (grad.to(x.dtype) + shortcut).to(x.dtype) if ctx.needs_input_grad[2] else None
        return None, None, input_grad, *gradients, *[None] * (len(ctx.needs_input_grad) - 3 - ctx.count)

    @staticmethod
    def output_again(job: Job, x: Tensor, parameters: list[Tensor]) -> Tensor:
        """The output from the input, and from the last convolution's output where that was kept."""
        weights = job.weights(parameters)
        if job.memory == 'recompute':
            job.inner = _run_again(job, x, weights)
            return job.inner[-1]
        return F.relu(_norm_again(job, len(job.convs) - 1, job.inner[-1], weights) + x)


def _forward(job: Job, x: Tensor, weights: dict[str, Tensor], norm: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """Outputs of all convolutions, and the block's."""
    h, outputs = x, []
    for index, (name, conv) in enumerate(zip(job.recipe.convs, job.convs, strict=True)):
        outputs.append(conv.run(h, weights[f'{name}.weight'], weights.get(f'{name}.bias')))
        h = norm(index, outputs[-1])
        h = F.relu(h + x if index == len(job.convs) - 1 else h)
    return [*outputs, h]


def _run_again(job: Job, x: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    return _forward(job, x, weights, lambda index, z: _norm_again(job, index, z, weights))


def _norm_again(job: Job, index: int, z: Tensor, weights: dict[str, Tensor]) -> Tensor:
    name = job.recipe.norms[index]
    return norm_again(job.block.get_submodule(name), job.training[index], z, **affine(weights, name))


def _norm_step(ctx: Any, index: int, outputs: list[Tensor], weights: dict[str, Tensor]) -> tuple:
    """A norm run again: its input, its parameters' names and values as leaves, and its output with a graph."""
    name = ctx.job.recipe.norms[index]
    with torch.enable_grad(), ctx.autocast():
        z = outputs[index].detach().requires_grad_()
        leaves = {slot: tensor.detach().requires_grad_() for slot, tensor in affine(weights, name).items()}
        normed = norm_again(ctx.job.block.get_submodule(name), ctx.job.training[index], z, **leaves)
    return z, [f'{name}.{slot}' for slot in leaves], list(leaves.values()), normed


def _conv_gradients(ctx: Any, index: int, grad: Tensor, z: Tensor, h: Tensor, weights: dict[str, Tensor]
                    ) -> dict[str, Tensor]:
    """The estimate for a convolution's weight, and its bias's gradient; h is its input, z its output."""
    name, job = ctx.job.recipe.convs[index], ctx.job
    weight, bias = weights[f'{name}.weight'].detach().to(z.dtype), weights.get(f'{name}.bias')
    conv, part = job.convs[index], ctx.parts[index]
    seen = part.of_input(h, weight.shape[2], conv) if index > 0 or ctx.whole else h
    found = estimate(grad, seen, weight, conv, part)
    exact, gradients = inner(grad, z, (0, 2, 3)), {}
    if bias is not None:
        gradients[f'{name}.bias'] = grad.sum((0, 2, 3))
        exact = exact - wide(gradients[f'{name}.bias']) * bias.detach()
    return gradients | {f'{name}.weight': with_exact_part(found, weight, exact) if job.parts > 1 else found}
