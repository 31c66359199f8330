r"""Convolution and BatchNorm in one: while BatchNorm is in eval mode, what lies between them isn't kept for backward.

.. math:: y = W' * x + b', \qquad W' = Wγ/σ, \quad b' = β + γ(c - μ)/σ, \quad σ = \sqrt{σ^2_{run} + ε}

with the convolution's weight W and bias c (0 without one) and the norm's γ, β and running statistics. Autograd keeps x
for the convolution and its output for γ; here x is kept, and W', which is small next to it but for tiny images.
Gradients are exact:

.. math:: ∂W = ∂W'\,γ/σ, \quad ∂γ_o = ⟨∂W'_o, W_o⟩/σ_o + ∂b'_o (c_o - μ_o)/σ_o, \quad ∂β = ∂b', \quad
          ∂c = ∂b'\,γ/σ, \qquad ∂W' = x \star ∂y, \quad ∂b' = \sum ∂y

A run of the model folds many convolutions in a few tensor operations (:mod:`.folded_weights`); one that an activation
checkpoint runs, or that runs by another way than the model's forward, folds alone. Where nothing learns and nothing
before does, there is nothing to keep, and nothing is folded.

A convolution that folds gives the norm's output, and the norm hands it on. Both are what they were in all else: state
dict, ``isinstance``, copies. They compute as before without gradient, while the norm trains, when compiled, traced or
exported, and once one of the two was exchanged (SyncBatchNorm conversion, ``fuse_conv_bn``).

Source: training on folded weights is the Tune mode of "Efficient ConvBN Blocks for Transfer Learning and Beyond",
arXiv 2305.11624 (``efficient_conv_bn_eval`` of MMCV and MMEngine), which folds one by one.
"""
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .._torch_compat import activation_checkpoint, autocast_dtype, is_compiling
from .folded_weights import AddShift, Pair, fold
from .pairs import find_pairs

MARK = '_norm_is_done'
"""Attribute of a convolution's output on its way to the norm: whether that was folded into the convolution."""
WEIGHTS = 10_000_000
"""How many weights are folded together at most: the gradients of all are there before DDP can send the first one's."""


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
            vars(module).pop('folded', None)


class _Paired:
    """A convolution or the norm behind it.

    Attributes:
        plain_class: what it was before.
        place_of_other: the module in which the other one stands, and its key there. It is looked up at every forward.
    """
    plain_class: type
    place_of_other: tuple[nn.Module, str]

    def other(self) -> Any:
        """The other one, None if it was exchanged or belongs to another: DataParallel's replicas do."""
        parent, key = self.place_of_other
        other = parent._modules.get(key)
        if not isinstance(other, _Paired):
            return None
        parent, key = other.place_of_other
        return other if parent._modules.get(key) is self else None


class FoldingConv2d(_Paired, nn.Conv2d, _ConvNd):  # the last for mmengine's initialisers: they look at direct bases
    """A convolution that folds the norm behind it where that is possible, and gives the norm's output then."""

    def pair(self) -> Pair | None:
        """What is folded; None where nothing is: computing layers' weights are only there while these run."""
        norm = self.other()
        if norm is None or norm.training:
            return None
        own, theirs, statistics = self._parameters, norm._parameters, norm._buffers
        pair = Pair(own['weight'], own['bias'], theirs['weight'], theirs['bias'],
                    statistics['running_mean'], statistics['running_var'], norm.eps)
        return None if pair.weight is None or pair.mean is None or pair.var is None else pair

    def frozen(self, pair: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W' and b' of a pair that stays as it is; folded again where a tensor was exchanged or written to."""
        tensors = [tensor for tensor in pair[:6] if tensor is not None]
        now = (dtype, [(tensor._version, tensor.data_ptr()) for tensor in tensors], tensors)
        before, folded = self.__dict__.get('folded', (None, None))
        if before is None or before[:2] != now[:2] or any(a is not b for a, b in zip(before[2], tensors, strict=True)):
            folded = next(fold([pair], dtype))
            self.folded = (now, folded)
        return folded

    def train(self, mode: bool = True) -> 'FoldingConv2d':
        self.__dict__.pop('folded', None)  # writing to a tensor's .data leaves no trace
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        folded = _folded(self, x)
        if folded is None:
            out = super().forward(x)
        elif folded[0].dtype == folded[1].dtype:
            out = self._conv_forward(x, *folded)
        else:
            kernel, shift = folded
            out = AddShift.apply(self._conv_forward(x, kernel, None), shift)
        if not is_compiling():
            setattr(out, MARK, folded is not None)
        return out


class _Run(NamedTuple):
    """One run of a model, or of what a computing layer runs.

    Attributes:
        batches: for each convolution, all that are to be folded together with it.
        folded: W' and b' of those that are folded and haven't run yet.
        checkpoint: the activation checkpoint in which it takes place.
        outer: the run in which it takes place.
    """
    root: nn.Module
    batches: dict[nn.Module, list[tuple[FoldingConv2d, Pair]]]
    folded: dict[nn.Module, tuple[Tensor, Tensor]]
    checkpoint: Any
    outer: '_Run | None'


_RUN: ContextVar[_Run | None] = ContextVar('_RUN', default=None)


def _folded(conv: FoldingConv2d, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """W' and b' of a convolution; None where it is not to fold.

    An activation checkpoint, which runs a part again, must run there what it has run before: only what began in it
    folds together in it.
    """
    if is_compiling() or not torch.is_grad_enabled():
        return None
    run = _RUN.get()
    while run is not None and conv not in run.batches:
        run = run.outer
    if run is not None and run.checkpoint != activation_checkpoint():
        run = None
    folded = None if run is None else run.folded.pop(conv, None)
    if folded is not None and (folded[0].dtype == x.dtype or autocast_dtype(x.device.type) is not None):
        return folded
    pair = conv.pair()
    if pair is None or not _may_fold(x) or not (x.requires_grad or pair.learns):
        return None
    cast = autocast_dtype(x.device.type) if pair.weight.dtype != torch.float64 else None
    dtype = cast or pair.weight.dtype
    if pair.frozen:
        return conv.frozen(pair, dtype)
    if run is None:
        return next(fold([pair], dtype))
    convs, pairs = zip(*run.batches[conv], strict=True)
    run.folded.update(zip(convs, fold(pairs, dtype), strict=True))
    return run.folded.pop(conv)


def _begin_run(root: nn.Module, _: Any) -> None:
    """Forward pre-hook: find out which convolutions are to be folded together."""
    if not _is_ordinary_run():
        return
    run = outer = _RUN.get()
    while run is not None:
        if run.root is root:  # it never ended
            outer = run.outer
        run = run.outer
    batches: dict[nn.Module, list[tuple[FoldingConv2d, Pair]]] = {}
    kinds: dict[tuple, list[tuple[FoldingConv2d, Pair]]] = {}
    sizes: dict[tuple, int] = {}
    for conv in _convolutions(root):
        inherited = outer is not None and outer.checkpoint == activation_checkpoint() and conv in outer.batches
        pair = None if inherited else conv.pair()  # a checkpoint's second run has no outer one
        if pair is None or pair.frozen:
            continue
        kind, size = pair.kind, pair.weight.numel()
        sizes[kind] = sizes.get(kind, WEIGHTS) + size
        if sizes[kind] > WEIGHTS:
            kinds[kind], sizes[kind] = [], size
        kinds[kind].append((conv, pair))
        batches[conv] = kinds[kind]
    _RUN.set(_Run(root, batches, {}, activation_checkpoint(), outer))


def _end_run(root: nn.Module, *_: Any) -> None:
    """Forward hook."""
    run = None if is_compiling() else _RUN.get()
    if run is not None and run.root is root:
        _RUN.set(run.outer)


def _convolutions(module: nn.Module) -> Iterator[FoldingConv2d]:
    for child in module._modules.values():
        if isinstance(child, FoldingConv2d):
            yield child
        elif child is not None and child._modules:
            yield from _convolutions(child)


class _FoldedNorm(_Paired):
    """A norm that hands on what its convolution has normalised.

    Raises:
        RuntimeError: the convolution has run under other conditions than the norm, or what it gave isn't what came
            here, so that nobody knows whether it is normalised.
    """

    def forward(self, x: Tensor) -> Tensor:
        done = getattr(x, MARK, None)  # under torch.compile, too: the convolution may have run outside
        if is_compiling():
            return x if done else super().forward(x)
        if done:
            self._check_input_dim(x)
            delattr(x, MARK)
            return x
        if done is None and not self.training and _may_fold(x) and self.other() is not None:
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
    return not (is_compiling() or not torch.is_grad_enabled()
                or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export())
