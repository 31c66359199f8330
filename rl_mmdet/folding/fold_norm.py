r"""Convolution and BatchNorm in one: while BatchNorm is in eval mode, what lies between them isn't kept for backward.

.. math:: y = W' * x + b', \qquad W' = Wγ/σ, \quad b' = β + γ(c - μ)/σ, \quad σ = \sqrt{σ^2_{run} + ε}

with the convolution's weight W and bias c (0 without one) and the norm's γ, β and running statistics. Autograd keeps x
for the convolution and its output for γ; here x alone is kept, and W' is made again in backward. Gradients are exact:

.. math:: ∂W = ∂W'\,γ/σ, \quad ∂γ_o = ⟨∂W'_o, W_o⟩/σ_o + ∂b'_o (c_o - μ_o)/σ_o, \quad ∂β = ∂b', \quad
          ∂c = ∂b'\,γ/σ, \qquad ∂W' = x \star ∂y, \quad ∂b' = \sum ∂y

A run of the model folds 32 convolutions at a time, those alike in a few tensor operations together; one that an
activation checkpoint runs, or that runs by another way than the model's forward, folds alone.

A convolution that folds gives the norm's output, and the norm hands it on. Both are what they were in all else: state
dict, ``isinstance``, copies. They compute as before without gradient, while the norm trains, when compiled, traced or
exported, and once one of the two was exchanged (SyncBatchNorm conversion, ``fuse_conv_bn``).

Source: training on folded weights is the Tune mode of "Efficient ConvBN Blocks for Transfer Learning and Beyond",
arXiv 2305.11624 (``efficient_conv_bn_eval`` of MMCV and MMEngine); it leaves backward to autograd, which keeps W', too.
"""
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from .folded_convolution import Batch, Folded, FoldedConvolution, Pair, Settings, in_order
from .pairs import find_pairs

MARK = '_norm_is_done'
"""Attribute of a convolution's output on its way to the norm that was folded into the convolution."""
TOGETHER, WEIGHTS = 32, 10_000_000
"""How many convolutions, and with how many weights, are folded together at most: their folded weights are alive at
once, and all gradients of these are there before DDP can send the first one's."""


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
    insides = [] if runs is None else [inside for inside in map(runs, model.modules()) if inside is not None]
    for root in (model, *insides):
        if _begin_run not in root._forward_pre_hooks.values():
            root.register_forward_pre_hook(_begin_run)
            root.register_forward_hook(_end_run, always_call=True)
    return list(pairs)


def unfold_norm_(model: nn.Module) -> None:
    """Undo :func:`fold_norm_`, in place; nothing happens to a model without folds."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_begin_run, _end_run)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
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

    def norm(self) -> Any:
        """The norm that it can fold; None where there is none."""
        norm = self.other()
        return norm if norm is not None and norm.has_fixed_statistics() else None

    def forward(self, x: Tensor) -> Tensor:
        if not _may_fold(x) or self.norm() is None:
            return super().forward(x)
        weight, device = self.weight, x.device.type
        cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if cast else weight.dtype
        run, alone, made = _RUN.get(), _is_checkpointed(), not isinstance(weight, nn.Parameter)
        others = None if alone or run is None else run.together.get(self)
        folded, again = (others or _Together([self])).fold(self, dtype)
        out = FoldedConvolution.apply(x.to(dtype) if cast else x, *folded,
                                      Settings(self.stride, self.padding, self.dilation, self.groups),
                                      None if alone or made and not weight.requires_grad else again)
        setattr(out, MARK, True)
        return out


class _Together:
    """Convolutions of one kind that are folded when the first of them runs."""

    def __init__(self, convs: list[FoldingConv2d]) -> None:
        self.convs = sorted(convs, key=lambda conv: in_order(conv.weight))
        self.folded: dict[torch.dtype, dict[FoldingConv2d, tuple[Folded, Callable[[], Tensor]]]] = {}

    def fold(self, conv: FoldingConv2d, dtype: torch.dtype) -> tuple[Folded, Callable[[], Tensor]]:
        """A convolution's folded weights, and what makes its W' again."""
        if conv not in self.folded.get(dtype, ()):
            batch = Batch([_pair(each) for each in self.convs], conv.norm().eps, dtype)
            self.folded[dtype] = {each: (folded, partial(batch.kernel_again, index))
                                  for index, (each, folded) in enumerate(zip(self.convs, batch.fold(), strict=True))}
        return self.folded[dtype].pop(conv)


class _Run(NamedTuple):
    """One run of a model, or of what a computing layer runs; ``outer`` is the run in which it takes place."""
    root: nn.Module
    together: dict[nn.Module, _Together]
    outer: '_Run | None'


_RUN: ContextVar[_Run | None] = ContextVar('_RUN', default=None)


def _begin_run(root: nn.Module, _: Any) -> None:
    """Forward pre-hook: find out which convolutions are to be folded together."""
    if torch.compiler.is_compiling():
        return
    outer = _RUN.get()
    if outer is not None and outer.root is root:  # it never ended
        outer = outer.outer
    known = {} if outer is None else outer.together
    kinds: dict[tuple, list[FoldingConv2d]] = {}
    for conv in root.modules() if _is_ordinary_run() and not _is_checkpointed() else ():
        if isinstance(conv, FoldingConv2d) and conv not in known and conv._parameters.get('weight') is not None:
            norm = conv.norm()
            if norm is not None:
                kinds.setdefault((norm.eps, *_pair(conv).kind), []).append(conv)
    parts = [_Together(part) for convs in kinds.values() for part in _parts(convs)]
    _RUN.set(_Run(root, known | {conv: part for part in parts for conv in part.convs}, outer))


def _end_run(root: nn.Module, *_: Any) -> None:
    """Forward hook."""
    run = None if torch.compiler.is_compiling() else _RUN.get()
    if run is not None and run.root is root:
        _RUN.set(run.outer)


def _parts(convs: list[FoldingConv2d]) -> list[list[FoldingConv2d]]:
    """Consecutive ones, at most ``TOGETHER`` of them and, where there are several, ``WEIGHTS`` weights."""
    parts: list[list[FoldingConv2d]] = []
    size = 0
    for conv in convs:
        size += conv.weight.numel()
        if not parts or len(parts[-1]) == TOGETHER or size > WEIGHTS:
            parts.append([])
            size = conv.weight.numel()
        parts[-1].append(conv)
    return parts


def _pair(conv: FoldingConv2d) -> Pair:
    norm = conv.norm()
    return Pair(conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)


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
    """The same for a convolution and its norm."""
    return _is_ordinary_run() and not x.is_meta


def _is_ordinary_run() -> bool:
    """Whether it is one with gradient."""
    return not (torch.compiler.is_compiling() or not torch.is_grad_enabled()
                or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export())


def _is_checkpointed() -> bool:
    """Whether this runs in an activation checkpoint, for the first time or again: both must keep the same."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return bool(hooks) and getattr(hooks[0], '__module__', '') == checkpoint.__module__
