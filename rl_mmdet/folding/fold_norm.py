r"""Convolution and BatchNorm in one: while BatchNorm is in eval mode, what lies between them isn't kept for backward.

.. math:: y = W' * x + b', \qquad W' = Wγ/σ, \quad b' = β + γ(c - μ)/σ, \quad σ = \sqrt{σ^2_{run} + ε}

with the convolution's weight W and bias c (0 without one) and the norm's γ, β and running statistics. Autograd keeps x
for the convolution and its output for γ; here x alone is kept, and W' is made again in backward. Gradients are exact:

.. math:: ∂W = ∂W'\,γ/σ, \quad ∂γ_o = ⟨∂W'_o, W_o⟩/σ_o + ∂b'_o (c_o - μ_o)/σ_o, \quad ∂β = ∂b', \quad
          ∂c = ∂b'\,γ/σ, \qquad ∂W' = x \star ∂y, \quad ∂b' = \sum ∂y

A convolution that folds gives the norm's output, and the norm hands it on. Both are what they were in all else: state
dict, ``isinstance``, copies. They compute as before without gradient, while the norm trains, when compiled, traced or
exported, and once one of the two was exchanged (SyncBatchNorm conversion, ``fuse_conv_bn``).

Source: training on folded weights is the Tune mode of "Efficient ConvBN Blocks for Transfer Learning and Beyond",
arXiv 2305.11624 (``efficient_conv_bn_eval`` of MMCV and MMEngine); it leaves backward to autograd, which keeps W', too.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .pairs import find_pairs

MARK = '_norm_is_done'
"""Attribute of a convolution's output on its way to the norm that was folded into the convolution."""


def fold_norm_(model: nn.Module, runs: Callable[[nn.Module], nn.Module | None] | None = None) -> list[str]:
    """Let every convolution of ``model`` that can do so fold the BatchNorm behind it, in place.

    These are ordinary 2d convolutions (``nn.Conv2d`` itself, padded with zeros) whose output goes to one BatchNorm with
    running statistics and nowhere else (:func:`~.pairs.find_pairs`). It only has an effect while the norm is in eval
    mode; a second call changes nothing.

    Args:
        model: replace its blocks first.
        runs: gives, for a module that runs another one which holds the same children, that other one, and None for
            all others; such modules can't be traced themselves. Computing layers are such modules.

    Returns:
        Names of these convolutions.

    Raises:
        ValueError: there is none.
    """
    pairs = find_pairs(model, lambda module: _class_that_folds(module) is not None, runs)
    if not pairs:
        raise ValueError(f'fold_norm: {type(model).__name__} has no ordinary convolution whose output goes to one '
                         'BatchNorm and nowhere else, so there is nothing to fold; leave fold_norm out')
    for conv, norm in pairs.items():
        for name, other in ((conv, norm), (norm, conv)):
            module, (parent, _, key) = model.get_submodule(name), other.rpartition('.')
            if not isinstance(module, _Paired):
                module.plain_class = type(module)
                module.__class__ = _class_that_folds(module)
            module.place_of_other = (model.get_submodule(parent), key)  # in a tuple it is no child
    return list(pairs)


def unfold_norm_(model: nn.Module) -> None:
    """Undo :func:`fold_norm_`, in place; nothing happens to a model without folds."""
    for module in model.modules():
        if isinstance(module, _Paired):
            module.__class__ = module.plain_class
            del module.plain_class, module.place_of_other


class _Paired:
    """A convolution or the norm behind it.

    Attributes:
        plain_class: what it was before.
        place_of_other: the module in which the other one stands, and its key there. It is looked up at every forward.
    """
    plain_class: type
    place_of_other: tuple[nn.Module, str]

    def _there(self) -> Any:
        parent, key = self.place_of_other
        return parent._modules.get(key)

    def other(self) -> Any:
        """The other one, None if it was exchanged or belongs to another: DataParallel's replicas do."""
        other = self._there()
        return other if isinstance(other, _Paired) and other._there() is self else None


class FoldingConv2d(_Paired, nn.Conv2d, _ConvNd):  # the last for mmengine's initialisers: they look at direct bases
    """A convolution that folds the norm behind it where that is possible, and gives the norm's output then."""

    def forward(self, x: Tensor) -> Tensor:
        if not _may_fold(x):
            return super().forward(x)
        norm = self.other()
        if norm is None or not norm.has_fixed_statistics():
            return super().forward(x)
        out = FoldedConvolution.apply(x, self.weight, self.bias, norm.weight, norm.bias, norm.running_mean,
                                      norm.running_var, norm.eps, _Settings.of(self))
        setattr(out, MARK, True)
        return out


class _FoldedNorm(_Paired):
    """A norm that hands on what its convolution has normalised.

    Raises:
        RuntimeError: the convolution has run under other conditions than the norm, or what it gave isn't what came
            here, so that nobody knows whether it is normalised.
    """

    def has_fixed_statistics(self) -> bool:
        return not self.training and self.running_mean is not None and self.running_var is not None

    def forward(self, x: Tensor) -> Tensor:
        done = getattr(x, MARK, False) is True  # under torch.compile, too: the convolution may have run outside
        if torch.compiler.is_compiling():
            return x if done else super().forward(x)
        if done:
            self._check_input_dim(x)
            delattr(x, MARK)
            return x
        if _may_fold(x) and self.has_fixed_statistics() and self.other() is not None:
            raise RuntimeError('fold_norm: a BatchNorm was to hand on what the convolution before it has normalised, '
                               'but got something else; call unfold_norm_ on this model')
        return super().forward(x)


class FoldedBatchNorm2d(_FoldedNorm, nn.BatchNorm2d, _BatchNorm):
    """See :class:`_FoldedNorm`."""


class FoldedSyncBatchNorm(_FoldedNorm, nn.SyncBatchNorm, _BatchNorm):
    """See :class:`_FoldedNorm`."""


def _class_that_folds(module: nn.Module) -> type | None:
    """The class for a convolution or norm that computes nothing but what its name says; None for all others."""
    if isinstance(module, _Paired):
        return type(module)
    if type(module) is nn.Conv2d:
        return FoldingConv2d if module.padding_mode == 'zeros' and not isinstance(module.padding, str) else None
    if getattr(module, 'running_mean', None) is None or getattr(module, 'running_var', None) is None:
        return None
    if isinstance(module, nn.SyncBatchNorm):  # MMEngine's, too, which only checks other sizes
        return FoldedSyncBatchNorm if type(module).forward is nn.SyncBatchNorm.forward else None
    return FoldedBatchNorm2d if type(module) is nn.BatchNorm2d else None


def _may_fold(x: Any) -> bool:
    """Whether this is an ordinary run with gradient; the same for a convolution and its norm."""
    return not (torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_meta
                or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export())


class _Settings(NamedTuple):
    """How a convolution goes over its map: in the order in which torch's functions take it."""
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> '_Settings':
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups)

    def backward(self, grad: Tensor, inputs: Tensor, kernel: Tensor, wanted: tuple[bool, bool]
                 ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the convolution's input and weight, those that are wanted."""
        return torch.ops.aten.convolution_backward(
            grad, inputs, kernel, None, self.stride, self.padding, self.dilation, False, (0, 0), self.groups,
            (*wanted, False))[:2]


class FoldedConvolution(torch.autograd.Function):
    """See the module's text.

    Inputs: x; weight and bias of the convolution and of the norm, running mean and variance; ε; and the convolution's
    settings. Under autocast it computes in that dtype, as a convolution does, from weights folded before.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
                mean: Tensor, var: Tensor, eps: float, conv: _Settings) -> Tensor:
        device = x.device.type
        cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if cast else weight.dtype
        with torch.autocast(device, enabled=False):
            kernel, shift = _fold(weight, bias, gamma, beta, mean, var, eps)
            inputs = x.to(dtype) if cast else x
            out = torch.conv2d(inputs, kernel.to(dtype), shift.to(dtype), *conv)
        ctx.eps, ctx.conv, ctx.shape, ctx.dtype = eps, conv, x.shape, x.dtype
        _, for_weight, _, for_gamma, *_ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if for_weight or for_gamma else None, weight, bias, gamma, mean, var)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        inputs, weight, bias, gamma, mean, var = ctx.saved_tensors
        for_x, for_weight, for_bias, for_gamma, for_beta = ctx.needs_input_grad[:5]
        with torch.autocast(grad.device.type, enabled=False):
            inverse, scale = _scales(gamma, var, ctx.eps)
            grad_x, grad_kernel = _convolution_backward(ctx, grad, inputs, weight, scale, for_x)
            grad_shift = grad.sum((0, 2, 3), dtype=scale.dtype) if for_bias or for_gamma or for_beta else None
            grad_gamma = None
            if for_gamma:
                product = (grad_kernel * weight).sum((1, 2, 3))
                grad_gamma = (inverse * (product + grad_shift * _offset(bias, mean))).to(gamma.dtype)
            return (grad_x, _scaled(grad_kernel, scale).to(weight.dtype) if for_weight else None,
                    (grad_shift * scale).to(bias.dtype) if for_bias else None, grad_gamma,
                    grad_shift if for_beta else None, None, None, None, None)


def _convolution_backward(ctx: Any, grad: Tensor, inputs: Tensor | None, weight: Tensor, scale: Tensor,
                          for_x: bool) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the folded weight, the second if the inputs were kept for it."""
    kernel = (_scaled(weight, scale) if for_x else weight).to(grad.dtype)
    if inputs is None:
        if not for_x:
            return None, None
        layout = torch.channels_last if grad.is_contiguous(memory_format=torch.channels_last) else \
            torch.contiguous_format
        like = grad.new_empty(()).expand(ctx.shape)  # only its shape matters
        grad_x, _ = ctx.conv.backward(grad, like, kernel.contiguous(memory_format=layout), (True, False))
        return grad_x.to(ctx.dtype), None
    grad_x, grad_kernel = ctx.conv.backward(grad, inputs, kernel, (for_x, True))
    return grad_x.to(ctx.dtype) if for_x else None, grad_kernel.to(scale.dtype)


def _fold(weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor,
          eps: float) -> tuple[Tensor, Tensor]:
    """W' and b'; see the module's text."""
    _, scale = _scales(gamma, var, eps)
    shift = scale * _offset(bias, mean)
    return _scaled(weight, scale), shift if beta is None else shift + beta


def _scales(gamma: Tensor | None, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """1/σ and γ/σ, in float32 or better."""
    inverse = (var if var.dtype == torch.float64 else var.float()).add(eps).rsqrt()
    return inverse, inverse if gamma is None else inverse * gamma


def _offset(bias: Tensor | None, mean: Tensor) -> Tensor:
    """c - μ."""
    return -mean if bias is None else bias - mean


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale.view(-1, 1, 1, 1)
