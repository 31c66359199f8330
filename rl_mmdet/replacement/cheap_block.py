r"""The cheap backward of a replaced block of convolutions: little kept, and its weights' gradients sampled.

A detached replaced block owns no weights, only the fusion's few parameters φ. They need the gradient of the block's
folded weights only in contraction with :math:`∂W'/∂φ`, so an unbiased estimate of it is enough:

.. math:: \widehat{∂L/∂W'} = K \sum_{r ∈ R_k} h_{r} \star g_{r}, \qquad k \sim U\{1 … K\}

over one of K bands :math:`R_k` of the rows of the output gradient g, with the rows of the input h that they saw; the
sum over all bands is the exact gradient, so the estimate has no bias. BatchNorm in eval mode is folded into the weights
before it, :math:`W' = Wγ/σ, b' = β + γ(c - μ)/σ`. The gradient of the block's input is exact. Kept for backward are

- the block's input, which the ReLU of the block before keeps anyway;
- one band of each further convolution's input, and a bool per number of it, for the ReLU;
- the output, which the block behind keeps anyway. With ``rebuild`` the whole input of the last convolution instead,
  from which the output is made again, and bits in place of bools, for the last ReLU, too.

Source: ours; see docs/method.md, "Facts".
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .block_parts import branch, keeps_its_shape

PLAIN = (nn.Conv2d, _BatchNorm, nn.ReLU, nn.Identity)
Folded = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """A block that computes :math:`σ(x + N_n(W_n * … σ(N_1(W_1 * x))))`: its convolutions' and norms' names, in order.
    """
    convs: list[str]
    norms: list[str]

    def foldable(self, block: nn.Module) -> bool:
        """Whether all norms are in eval mode now."""
        return not any(block.get_submodule(name).training for name in self.norms)

    def fold(self, block: nn.Module, tensors: dict[str, Tensor]) -> Folded:
        """The weights and biases of its convolutions with the norms in them.

        Args:
            block: its norms have the running statistics.
            tensors: the block's parameters by name.
        """
        folded = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            module = block.get_submodule(norm)
            scale = (module.running_var + module.eps).rsqrt()
            if f'{norm}.weight' in tensors:
                scale = scale * tensors[f'{norm}.weight']
            shift = -module.running_mean
            if f'{conv}.bias' in tensors:
                shift = shift + tensors[f'{conv}.bias']
            bias = shift * scale
            if f'{norm}.bias' in tensors:
                bias = bias + tensors[f'{norm}.bias']
            folded.append((tensors[f'{conv}.weight'] * scale.view(-1, 1, 1, 1), bias))
        return folded


def recipe_of(block: nn.Module) -> Recipe | None:
    """How the block is computed, or None if it isn't known to be such a block.

    It must consist of ordinary convolutions, each with a BatchNorm behind it, and ReLUs, and keep its shape. Whether it
    computes what the recipe says is then checked by its outputs, see :func:`agrees`.
    """
    convs = branch(block)
    if not convs or not keeps_its_shape(block):
        return None
    modules = [(name, module) for name, module in block.named_modules() if not list(module.children())]
    if not all(isinstance(module, PLAIN) for _, module in modules):
        return None
    norms = {name: module for name, module in modules if isinstance(module, _BatchNorm)}
    matches = len(norms) == len(convs) and all(
        norm.num_features == conv.out_channels and norm.running_mean is not None
        for norm, conv in zip(norms.values(), convs.values(), strict=True))
    relus = any(isinstance(module, nn.ReLU) for _, module in modules)
    return Recipe(list(convs), list(norms)) if matches and relus else None


@torch.no_grad()
def agrees(recipe: Recipe, block: nn.Module, tensors: dict[str, Tensor], run: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``run``, the block on these tensors in eval mode, computes what the recipe says."""
    like = next(iter(tensors.values()))
    convs = [block.get_submodule(name) for name in recipe.convs]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, convs[0].in_channels, 6, 6, generator=generator).to(like)
    with torch.autocast(like.device.type, enabled=False):
        made, expected = _forward(x, recipe.fold(block, tensors), convs)[-1], run(x)
    tolerance = max(1e-3, 16 * torch.finfo(like.dtype).eps)
    return made.shape == expected.shape and torch.allclose(made, expected, tolerance,
                                                           tolerance * expected.abs().max().item())


def _forward(x: Tensor, folded: Folded, convs: list[nn.Conv2d]) -> list[Tensor]:
    """Inputs of all convolutions, and the output."""
    inputs = [x]
    for index, ((weight, bias), conv) in enumerate(zip(folded, convs, strict=True)):
        out = F.conv2d(inputs[-1], weight, bias, 1, conv.padding, conv.dilation, conv.groups)
        inputs.append(F.relu_(out if index < len(convs) - 1 else out.add_(x)))
    return inputs


@dataclass
class Job:
    """One run of a block, what its forward tells its backward.

    Args:
        fold: the folded weights, from the fusion's parameters.
        convs: the block's convolutions, for their settings.
        bands: K, how many bands of rows there are.
        rebuild: keep the last convolution's whole input in place of the output, for :meth:`again`.
        keep_input: keep the block's whole input and not only a band of it.
        last: the last convolution's input, once forward has run.
    """
    fold: Callable[[list[Tensor]], Folded]
    convs: list[nn.Conv2d]
    bands: int
    rebuild: bool = False
    keep_input: bool = True
    last: Tensor | None = None

    def again(self, x: Tensor, parameters: list[Tensor]) -> Tensor:
        """The block's output from its input and the last convolution's."""
        weight, bias = self.fold(parameters)[-1]
        conv = self.convs[-1]
        out = F.conv2d(self.last, weight.to(x), bias.to(x), 1, conv.padding, conv.dilation, conv.groups)
        return F.relu_(out.add_(x))


class CheapBlock(torch.autograd.Function):
    """See the module's text. Inputs: the job, how many fusion parameters there are, x, these, and tensors to watch."""

    @staticmethod
    def forward(ctx: Any, job: Job, count: int, x: Tensor, *tensors: Tensor) -> Tensor:
        parameters = [tensor.detach() for tensor in tensors[:count]]
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            folded = [(weight.to(dtype), bias.to(dtype)) for weight, bias in job.fold(parameters)]
            *inputs, out = _forward(x.to(dtype), folded, job.convs)
        ctx.job, ctx.count, ctx.dtype, ctx.x_dtype = job, count, dtype, x.dtype
        ctx.picks = [_pick(out.shape[-2], job.bands) for _ in job.convs]
        whole = {0} if job.keep_input and dtype == x.dtype else set()
        masks = [_bits(h > 0) if job.rebuild else h > 0 for h in inputs[1:]] + [_bits(out > 0) if job.rebuild else out]
        if job.rebuild:
            whole.add(len(inputs) - 1)
            job.last = masks[-2] = inputs[-1]
        bands = [h if index in whole else _band(h, pick, conv)
                 for index, (h, pick, conv) in enumerate(zip(inputs, ctx.picks, job.convs, strict=True))]
        ctx.whole, ctx.shapes = whole, [h.shape for h in (*inputs[1:], out)]
        ctx.save_for_backward(*tensors, *bands, *masks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        job, layers = ctx.job, len(ctx.job.convs)
        saved = ctx.saved_tensors
        tensors, bands, masks = saved[:-2 * layers], saved[-2 * layers:-layers], saved[-layers:]
        with torch.enable_grad():
            parameters = [tensor.detach().requires_grad_() for tensor in tensors[:ctx.count]]
            folded = job.fold(parameters)
        grad = grad.to(ctx.dtype) * _positive(masks[-1], ctx.shapes[-1])
        shortcut, weight_grads, bias_grads = grad, [], []
        for index in reversed(range(layers)):
            conv, band, (top, bottom) = job.convs[index], bands[index], ctx.picks[index]
            if index in ctx.whole:
                band = _band(band, (top, bottom), conv)
            weight = folded[index][0].detach().to(ctx.dtype)
            estimate = _weight_gradient(grad[..., top:bottom, :], band, weight, conv)
            weight_grads.insert(0, estimate * _bands_of(grad.shape[-2], job.bands))
            bias_grads.insert(0, grad.sum((0, 2, 3)))
            if index or ctx.needs_input_grad[2]:
                grad = _input_gradient(grad, weight, conv)
                if index:
                    grad = grad * _positive(masks[index - 1], ctx.shapes[index - 1])
        outputs = [tensor for pair in folded for tensor in pair]
        grads = [g for pair in zip(weight_grads, bias_grads, strict=True) for g in pair]
        gradients = torch.autograd.grad(outputs, parameters, [
            g.to(tensor.dtype) for g, tensor in zip(grads, outputs, strict=True)], allow_unused=True)
        input_gradient = (grad + shortcut).to(ctx.x_dtype) if ctx.needs_input_grad[2] else None
        return None, None, input_gradient, *gradients, *[None] * (len(tensors) - ctx.count)


def _bits(mask: Tensor) -> Tensor:
    """Eight bools in a byte."""
    flat = F.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def _positive(kept: Tensor, shape: torch.Size) -> Tensor:
    """Where a ReLU let something through, from its output, from bools or from bits."""
    if kept.dtype != torch.uint8:
        return kept > 0
    bits = kept[:, None] >> torch.arange(8, dtype=torch.uint8, device=kept.device) & 1
    return bits.flatten()[:shape.numel()].view(shape).bool()


def _bands_of(rows: int, bands: int) -> int:
    """As many bands as asked for, but none without rows."""
    return -(-rows // -(-rows // min(bands, rows)))


def _pick(rows: int, bands: int) -> tuple[int, int]:
    """First row and end of a random band, by torch's generator: checkpointing restores it."""
    size, count = -(-rows // min(bands, rows)), _bands_of(rows, bands)
    index = int(torch.randint(count, ())) if count > 1 else 0
    return index * size, min(rows, (index + 1) * size)


def _band(h: Tensor, pick: tuple[int, int], conv: nn.Conv2d) -> Tensor:
    """The rows of a convolution's input that the picked rows of its output see; zeros beyond the map's edge."""
    margin = conv.dilation[0] * (conv.kernel_size[0] - 1)
    top, bottom = pick[0] - conv.padding[0], pick[1] - conv.padding[0] + margin
    inside = h[..., max(0, top):min(h.shape[-2], bottom), :]
    if inside.shape == h.shape and top == 0 and bottom == h.shape[-2]:
        return h
    return F.pad(inside, (0, 0, max(0, -top), max(0, bottom - h.shape[-2])))  # a copy, without margins, too


def _weight_gradient(grad: Tensor, band: Tensor, weight: Tensor, conv: nn.Conv2d) -> Tensor:
    return torch.ops.aten.convolution_backward(
        grad.contiguous(), band, weight, None, (1, 1), (0, conv.padding[1]), conv.dilation, False, (0, 0), conv.groups,
        (False, True, False))[1]


def _input_gradient(grad: Tensor, weight: Tensor, conv: nn.Conv2d) -> Tensor:
    like = grad.new_empty(()).expand(grad.shape[0], conv.in_channels, *grad.shape[2:])
    return torch.ops.aten.convolution_backward(
        grad, like, weight, None, (1, 1), conv.padding, conv.dilation, False, (0, 0), conv.groups,
        (True, False, False))[0]
