r"""The convolutions and linear layers of any block, each with a sampled weight gradient.

For blocks that no recipe is known for: Swin's and ViT's, ConvNeXt's, Res2Net's, those with deformable convolutions or
plugins, light operators. The block runs as it is, except that each convolution and linear layer whose weight was made
for it keeps in place of its input the part that :mod:`~rl_mmdet.replacement.sampling` draws, and of its weight nothing:
the weights are made again in backward, once for all of them. Where the input is a ReLU's output, which that keeps
anyway, or what a norm or an activation made of a tensor that it keeps itself, the part is taken or made again from that
one. All other gradients are autograd's. Functions that torch runs as one, as ``nn.MultiheadAttention``, stay as they
are.

A linear layer right behind a LayerNorm has the control variate of :mod:`~rl_mmdet.replacement.sampling`: with
:math:`h = γ⊙\hat x + β` its input,

.. math:: ⟨∂L/∂W, W⟩ = ⟨∂L/∂h, h⟩ = ⟨∂L/∂γ, γ⟩ + ⟨∂L/∂β, β⟩
"""
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from .rebuild import rebuilt_input
from .sampling import ConvSettings, estimate, inner, input_gradient, pick, pick_part, with_exact_part

Make = Callable[[list[Tensor]], dict[str, Tensor]]


@dataclass
class Run:
    """One run of a block.

    Args:
        make: makes the weights from the fusion's parameters.
        parts: K, how many parts a layer's positions have.
        names: of the weights.
        norms: by the name of a linear layer's weight, those of the norm's parameters that its input is scaled by.
        uses: how often each weight was used, by name.
        watched: what the weights are made of, and the versions of these tensors.
    """
    make: Make
    parts: int
    names: list[str] = field(default_factory=list)
    norms: dict[str, list[str]] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    watched: list[tuple[Tensor, int]] = field(default_factory=list)


class Synthesis(torch.autograd.Function):
    """A block's weights from the fusion's parameters; nothing but these is kept.

    Inputs: the run, how many parameters there are, these, and tensors to watch for changes.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = run.make([tensor.detach() for tensor in tensors[:count]])
        run.names.extend(made)
        run.watched.extend((tensor, tensor._version) for tensor in tensors)
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(made.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        tensors = ctx.saved_tensors
        with torch.enable_grad():
            parameters = [tensor.detach().requires_grad_() for tensor in tensors[:ctx.count]]
            made = ctx.run.make(parameters)
        grads = {name: grad for name, grad in zip(made, grads, strict=True) if grad is not None}
        if ctx.run.parts > 1:
            grads |= _steered(grads, made, ctx.run)
        used = [name for name in grads if made[name].requires_grad]
        found = torch.autograd.grad([made[name] for name in used], parameters, [
            grads[name].to(made[name].dtype) for name in used], allow_unused=True) if used else [None] * ctx.count
        return None, None, *found, *[None] * (len(tensors) - ctx.count)


def _steered(grads: dict[str, Tensor], made: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
    """The estimates whose part along the weight is known from a norm before them, with that part."""
    steered = {}
    for name, parameters in run.norms.items():
        if all(each in grads and run.uses[each] == 1 for each in (name, *parameters)):
            exact = sum(inner(grads[parameter], made[parameter].detach(), (0,)) for parameter in parameters)
            steered[name] = with_exact_part(grads[name], made[name].detach(), exact)
    return steered


class Again:
    """A block's weights, made once more in backward and dropped when all that need them have had theirs."""

    def __init__(self, make: Callable[[], dict[str, Tensor]]) -> None:
        self.make = make
        self.users: list[str] = []
        self.watched: list[tuple[Tensor, int]] = []
        self._left: Counter[str] = Counter()
        self._made: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        if any(tensor._version != version for tensor, version in self.watched):
            raise RuntimeError('what a computing layer makes its weights of was modified by an inplace operation '
                               'between forward and backward')
        if not self._left[name]:
            made = self.make()
            self._left = Counter(self.users)
            self._made = {user: made[user] for user in self.users}
        self._left[name] -= 1
        return self._made[name] if self._left[name] else self._made.pop(name)


@dataclass
class Source:
    """What a tensor was made of by a norm or an activation that keeps its input.

    Args:
        output: the tensor.
        of: the input, which is kept anyway.
        function: makes the output, or the same part of it, of the input.
        parameters: the names of a norm's.
        version: of the output when it was made; another one says that it was changed in place.
        of_zero: whether it makes 0 of 0, as the zeros around a map.
        used: whether something has taken the output.
    """
    output: weakref.ref
    of: Tensor
    function: Callable[[Tensor], Tensor]
    parameters: list[str]
    version: int
    of_zero: bool
    used: bool = False


class SampledLayers(TorchFunctionMode):
    """While it is on, convolutions and linear layers on these weights have sampled weight gradients.

    Args:
        run: the run; :class:`Synthesis` has made its weights.
        weights: by name; they have a graph.
        again: makes them again, without one.
    """

    def __init__(self, run: Run, weights: dict[str, Tensor], again: Again) -> None:
        super().__init__()
        self.run = run
        self.names = {id(tensor): name for name, tensor in weights.items() if tensor.requires_grad}
        self.weights = weights  # keeps their ids theirs
        self.again = again
        self.again.watched = run.watched
        self.sources: dict[int, Source] = {}

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in LAYERS:
            called = LAYERS[func](*args, **kwargs)
            if called is not None and called[1].ndim > 1 and id(called[1]) in self.names:
                return self._layer(*called)
        out = func(*args, **kwargs)
        if any(True for _ in _tensors(out)):
            for tensor in _tensors(args, kwargs):
                self._used(tensor, None)
            if func in SOURCES and not kwargs.get('inplace'):
                self._remember(func, out, *args, **kwargs)
        return out

    def _layer(self, x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvSettings | None) -> Tensor:
        name, source = self.names[id(weight)], self._source(x)
        self.again.users.append(name)
        self._used(x, name if conv is None else None)
        self._used(weight, None)
        if source is not None and (source.version != x._version or source.of.dtype != x.dtype
                                   or conv is not None and not source.of_zero):
            source = None  # it makes something else, or autocast keeps a copy of its input
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        kept, function = (source.of.detach(), source.function) if source else (x.detach(), _same if _kept(x) else None)
        with torch.autocast(device, enabled=False):
            x, bias = x.to(dtype), bias if bias is None else bias.to(dtype)
            note = Note.apply(self.again, name, self.run.parts, conv, kept, function, x, weight)
            return Output.apply(conv, x.detach(), weight.detach().to(dtype), bias, note)

    def _remember(self, func: Callable, out: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> None:
        tensors = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor)]
        if out is input or not out.requires_grad or func is F.layer_norm and out.shape[-1:] != tuple(args[0]):
            return
        values = [tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in args]
        named = {key: tensor.detach() if isinstance(tensor, Tensor) else tensor for key, tensor in kwargs.items()}
        known = [self.names[id(tensor)] for tensor in tensors if id(tensor) in self.names]
        self.sources[id(out)] = Source(weakref.ref(out), input, partial(_apply, func, values, named),
                                       known if len(known) == len(tensors) else [], out._version,
                                       func is not F.layer_norm)

    def _source(self, x: Tensor) -> Source | None:
        source = self.sources.get(id(x))
        return source if source is not None and source.output() is x else None

    def _used(self, x: Tensor, by: str | None) -> None:
        """Note who takes a norm's output: only where it is one linear layer alone, its control variate is known."""
        if id(x) in self.names:
            self.run.uses[self.names[id(x)]] += 1
        source = self._source(x)
        if source is None or not source.parameters:
            return
        if by is not None and not source.used:
            self.run.norms[by] = source.parameters
        else:
            self.run.norms = {name: of for name, of in self.run.norms.items() if of is not source.parameters}
        source.used = True


def _tensors(*values: Any) -> Iterator[Tensor]:
    """All tensors among what a function is given or gives back."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(*value)
        elif isinstance(value, dict):
            yield from _tensors(*value.values())


def _kept(x: Tensor) -> bool:
    """Whether x is kept for backward by what made it."""
    return type(x.grad_fn).__name__ in KEEP_THEIRS and rebuilt_input(x) is None


def _same(x: Tensor) -> Tensor:
    return x


def _apply(func: Callable, args: list, kwargs: dict[str, Any], x: Tensor) -> Tensor:
    return func(x, *args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple | None:
    return (input, weight, bias, None) if input.ndim > 1 else None


def _conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
            dilation: Any = 1, groups: int = 1) -> tuple | None:
    if input.ndim != 4 or isinstance(padding, str):
        return None
    sizes = [tuple(size) * 2 if len(tuple(size)) == 1 else tuple(size)
             for size in (v if isinstance(v, (tuple, list)) else (v,) for v in (stride, padding, dilation))]
    return input, weight, bias, ConvSettings(*sizes, groups)


LAYERS = {F.linear: _linear, F.conv2d: _conv2d}
SOURCES = {F.layer_norm, F.gelu, F.silu}
"""Functions of each position alone that keep their input for backward."""
KEEP_THEIRS = ('ReluBackward0', 'FoldedBlockBackward', 'NormedBlockBackward')
"""What keeps its output for backward."""


class Note(torch.autograd.Function):
    """What a layer keeps, and its backward. Its output stands for the layer's: it has its shape, but no numbers.

    It is apart from :class:`Output`, so that an activation checkpoint, which runs a block again until all is there
    that is kept, needn't compute the last layer's output once more.
    """

    @staticmethod
    def forward(ctx: Any, again: Again, name: str, parts: int, conv: ConvSettings | None, kept: Tensor,
                function: Callable[[Tensor], Tensor] | None, x: Tensor, weight: Tensor) -> Tensor:
        ctx.again, ctx.name, ctx.conv, ctx.function = again, name, conv, function
        ctx.shape, ctx.weight_dtype, ctx.kernel = x.shape, weight.dtype, weight.shape[2:3]
        if conv is None:
            shape, count = (*x.shape[:-1], len(weight)), x[..., 0].numel()
            ctx.count = max(1, min(parts, count))
            ctx.part = pick(ctx.count)
        else:
            shape = conv.output_shape(x.shape, weight.shape)
            ctx.part = pick_part(shape[-2], weight.shape[2], conv, parts)
        ctx.save_for_backward(kept if function else Note.part_of(ctx, x))
        return x.new_empty(()).expand(shape)

    @staticmethod
    def part_of(ctx: Any, x: Tensor) -> Tensor:
        """What the drawn part of the output sees of the input."""
        if ctx.conv is not None:
            return ctx.part.of_input(x, *ctx.kernel, ctx.conv)
        tokens = x.reshape(-1, x.shape[-1])
        return tokens[ctx.part::ctx.count].clone() if ctx.count > 1 else tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        [seen] = ctx.saved_tensors
        if ctx.function is not None:
            seen = ctx.function(Note.part_of(ctx, seen)).to(grad.dtype)
        weight = ctx.again.take(ctx.name).to(grad.dtype)
        if ctx.conv is None:
            found = grad.reshape(-1, grad.shape[-1])[ctx.part::ctx.count].T @ seen * ctx.count
            x_grad = grad @ weight if ctx.needs_input_grad[6] else None
        else:
            found = estimate(grad, seen, weight, ctx.conv, ctx.part)
            x_grad = input_gradient(grad, weight, ctx.shape, ctx.conv) if ctx.needs_input_grad[6] else None
        return None, None, None, None, None, None, x_grad, found.to(ctx.weight_dtype)


class Output(torch.autograd.Function):
    """The layer's output; its gradient goes on to the note and the bias."""

    @staticmethod
    def forward(ctx: Any, conv: ConvSettings | None, x: Tensor, weight: Tensor, bias: Tensor | None,
                note: Tensor) -> Tensor:
        ctx.others = (0, 2, 3) if conv else tuple(range(x.ndim - 1))
        return conv.run(x, weight, bias) if conv else F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, None, None, grad.sum(ctx.others) if ctx.needs_input_grad[3] else None, grad
