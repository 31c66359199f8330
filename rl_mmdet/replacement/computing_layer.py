"""The computing layer: the module that stands where a block was."""
import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from .._torch_compat import is_compiling
from .block_structure import all_parameters, slot_of
from .chain import Chain, Choice
from .fusions import Fusion, Pair
from .gradient import Gradient, scaled_gradients, with_zero_gradients
from .operators import Operator
from .rebuild import can_be_made_again
from .resize import Shape, resize
from .template import MADE, RunLock, attributes_of, drop_parameters_, statistics_stay, take_parameters_, with_tensors


class LayerSettings(NamedTuple):
    """What all computing layers of a model have in common: with what, as what, how they learn, and from what.

    ``start`` is one of :mod:`rl_mmdet.replacement.start`.
    """
    fusion: Fusion
    operator: Operator
    gradient: Gradient
    start: Any


@dataclass(frozen=True)
class RemovedBlock:
    """What is remembered of a block that was removed.

    Args:
        shapes: of all its tensors that are gone, by name.
        learned: whether each of them learned.
        unused_buffers: names of its buffers that the operator has no use for.
        with_cp: whether it was checkpointed.
        attributes: names of what can be set on it and has no effect any more, as the operator runs something else.
        block: the block itself, as long as the layer is to be fitted to it (``start.keeps_block``).
    """
    shapes: dict[str, Shape]
    learned: dict[str, bool]
    unused_buffers: frozenset[str]
    with_cp: bool
    attributes: frozenset[str]
    block: nn.Module | None = None


class ComputingLayer(nn.Module):
    r"""Stands where a block was and makes its weights from the nearest kept blocks.

    .. math:: h_{out} = C\big(h_{in};\; T(θ_p, θ_n)\big)

    with the fusion :math:`T` and the operator :math:`C`. Its state are their parameters and the buffers of what
    the operator runs, under the removed block's names where it is that block (BatchNorm running statistics), and what
    the operator leaves untouched of the block, under the block's names, nothing else: the neighbours are referenced,
    not owned, and so are moved, saved and copied where they stand.
    ``copy.deepcopy`` of a model yields computing layers that point into the copy.

    To its surroundings it is a block: attributes that it doesn't have itself are set on the template and read from
    there, and the template's methods run on the weights that are made.

    Args:
        chain, index: the block to remove. It is taken over: its parameters are dropped, but those that the operator
            leaves untouched.
        choice: all blocks that are replaced, by chain name.
        settings: fusion, operator and gradient.
        copy_of_block: taken over in the place of the chain's block, which stays: it isn't decided yet which of the two
            will.

    Attributes:
        template: what the operator runs: the removed block or something lighter; its parameters are None, but those
            of submodules that the operator leaves untouched.
        kept: the kept blocks whose tensors are used, the neighbours first.
        removed: what is remembered of the removed block.
        made: shapes of the tensors that the fusion makes, by name.
        untouched: names of the parameters that stay the block's own.
        turn: whether it learns in this step; None if nobody counts the steps. See :class:`~.gradient.Gradient`.
        norm_stale: the weights are new, and BatchNorm's running statistics still the removed block's.
        fit_wanted: a baseline's weights have been loaded, and ``start`` has a fit to make with them.
        undecayed: the optimizer was built so that weight decay leaves the layer's own parameters alone.
        provisional: the block is still there, and this layer is a child of it.
        lock: held while the template has weights: threads that predict with one model take turns.

    Raises:
        AttributeError: something is set that only the removed block would have used, and the operator runs another
            module.

    Sources: arXiv 2410.01239 (RL-v1), arXiv 2605.19533 (RL-v2, "computing layer").
    """

    def __init__(self, chain: Chain, index: int, choice: Choice, settings: LayerSettings,
                 copy_of_block: nn.Module | None = None) -> None:
        super().__init__()
        block = chain.blocks[index] if copy_of_block is None else copy_of_block
        self.provisional = copy_of_block is not None
        self.fusion, self.operator, self.gradient, self.start = settings
        self.made = chain.shapes_to_make(index)
        self.turn: bool | None = None
        self.norm_stale = True
        self.fit_wanted = False
        self.undecayed = False
        self.lock = RunLock()
        self.donors: dict[str, tuple[int | None, int | None]] = {}
        """For every tensor to make: which of the kept blocks before and after give it, counted as in ``kept``."""
        self._add_parameters(block)
        whole = copy.deepcopy(block) if self.start.keeps_block and not self.provisional else None
        buffers, with_cp = {name for name, _ in block.named_buffers()}, bool(getattr(block, 'with_cp', False))
        if with_cp:
            block.with_cp = False  # done around the whole layer instead: the weights exist only while it runs
        template, self.untouched = self.operator.template(block), self.operator.untouched(block)
        gone = {name: parameter for name, parameter in all_parameters(block) if name not in self.untouched}
        self.removed = RemovedBlock(
            {name: tuple(parameter.shape) for name, parameter in gone.items()},
            {name: parameter.requires_grad for name, parameter in gone.items()},
            frozenset(buffers - {name for name, _ in template.named_buffers()}), with_cp,
            frozenset() if template is block else attributes_of(block), whole)
        drop_parameters_(block, self.untouched)
        drop_parameters_(template, self.untouched)
        for name in [name for name in template._parameters if name in self.untouched]:
            self.register_parameter(name, template._parameters[name])
            template._parameters[name] = None
        if self.provisional and self.untouched:
            self._register_state_dict_hook(_save_shared_once)
        # The template's children and buffers are this layer's, in the same dicts, so that whoever moves or exchanges
        # them does it for both.
        self._modules, self._buffers = template._modules, template._buffers
        self._non_persistent_buffers_set = template._non_persistent_buffers_set
        self.training = template.training
        self._unowned: tuple[nn.Module, ...] = (template,)
        self.take_from(chain, index, choice)

    def _add_parameters(self, block: nn.Module) -> None:
        self._start_of_operator = self.operator.start(block)
        like, start = next(block.parameters()), self.start_values()
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(value.to(like, copy=True)))
        self.learned = tuple(start)
        """Names of the parameters that the fusion and the operator learn."""

    def take_from(self, chain: Chain, index: int, choice: Choice) -> None:
        """Take the weights from the kept blocks that are nearest with this choice. Arguments as in the class."""
        donors, neighbours = chain.donors(index, choice), chain.neighbours(index, choice)
        used = [place for sides in (neighbours, *donors.values()) for place in sides if place is not None]
        places = list(dict.fromkeys(used))
        self.donors = {name: tuple(None if place is None else places.index(place) for place in sides)
                       for name, sides in donors.items()}
        # In a tuple these modules are no children of this one.
        self._unowned = (self.template, *(place.block for place in places))

    def forget_block_(self) -> None:
        """Drop the removed block that ``start`` has kept."""
        self.removed = replace(self.removed, block=None)
        self.fit_wanted = False

    @property
    def template(self) -> nn.Module:
        return self._unowned[0]

    @property
    def kept(self) -> tuple[nn.Module, ...]:
        return self._unowned[1:]

    def pairs(self) -> dict[str, Pair]:
        """The two tensors of kept blocks, before and after, for every tensor to make, in its shape."""
        detach = self.gradient.mode == 'detached'

        def tensor_of(donor: int | None, name: str) -> Tensor | None:
            if donor is None:
                return None
            tensor = _tensor(self.kept[donor], name)
            tensor = resize(name, tensor.detach() if detach else tensor, self.removed.shapes[name])
            return tensor if tensor.shape == self.made[name] else self.operator.read(tensor, self.made[name])

        return {name: tuple(tensor_of(donor, name) for donor in sides) for name, sides in self.donors.items()}

    def weights(self, factor: int = 1) -> dict[str, Tensor]:
        """The weights of the template that the fusion and the operator make.

        Args:
            factor: by what their gradient is multiplied; 0 makes them constants.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and factor > 0):
            parameters = scaled_gradients(self.own_parameters(), factor)
            tensors = self.fusion.fuse(parameters, self.pairs()) if self.made else {}
            return self.operator.weights(self.template, tensors, parameters)

    def start_values(self) -> dict[str, Tensor]:
        """From what the parameters start that the fusion and the operator learn, by name; of any type."""
        return (self.fusion.start(self.made) if self.made else {}) | self._start_of_operator

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What the fusion and the operator learn, by name; not what is left untouched of the block."""
        own = self._parameters
        return {name: own[name] if name in own else getattr(self, name) for name in self.learned}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same inputs, outputs and shapes as the removed block."""
        return self._run('forward', *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if '_unowned' not in self.__dict__ or name.startswith('__') or not hasattr(self.template, name):
                raise
        value = getattr(self.template, name)
        if inspect.ismethod(value) and name not in vars(self.template):
            return partial(self._initialise if name == 'init_weights' else self._run, name)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.is_own(name) or isinstance(value, (nn.Module, nn.Parameter))
        if own:
            super().__setattr__(name, value)
        elif name in self.removed.attributes:
            raise AttributeError(f'{name}={value!r} was set on a replaced block, but {self.operator} runs something '
                                 'else there, which has no use for it; take operator FullBlock')
        elif self.removed.block is not None:
            setattr(self.removed.block, name, value)
        if not own or (name == 'training' and '_unowned' in self.__dict__):
            setattr(self.template, name, value)

    def __delattr__(self, name: str) -> None:
        if self.is_own(name):
            super().__delattr__(name)
            return
        delattr(self.template, name)
        if self.removed.block is not None:
            vars(self.removed.block).pop(name, None)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As ever, but MMEngine's ``fuse_conv_bn`` looks for weights to change right here, and there are none.

        Raises:
            RuntimeError: it has called.
        """
        if sys._getframe(1).f_code.co_name == 'fuse_conv_bn':
            raise RuntimeError(f'fuse_conv_bn can\'t fuse a replaced block, {MADE} (the model as it was: of this one '
                               'some blocks are fused by now)')
        return super().named_children()

    def is_own(self, name: str) -> bool:
        """Whether an attribute is the layer's, not the template's."""
        own = self.__dict__
        return ('_unowned' not in own or name in own or hasattr(type(self), name)
                or any(name in own[kind] for kind in ('_parameters', '_buffers', '_modules')))

    def stand_ins(self) -> AbstractContextManager:
        """The context in which the template has tensors where its weights are made, for code that initialises them."""
        with torch.no_grad():
            tensors = {name: torch.zeros_like(tensor) for name, tensor in self.weights().items()}
        if self.operator.light:  # where all of the block's layers may have biases, nobody asks for them
            biases = {f'{name.removesuffix("weight")}bias': tensor.new_zeros(len(tensor))
                      for name, tensor in tensors.items() if name.endswith('weight')}
            tensors = biases | tensors
        return with_tensors(self.template, tensors)

    def _initialise(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Let the template initialise what is left of it."""
        with self.stand_ins():
            getattr(self.template, method)(*args, **kwargs)

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], fx.Proxy):  # a trace doesn't look into it, as with torch's own modules
            tracer = args[0].tracer
            return tracer.create_proxy('call_module', tracer.path_of_module(self), args, kwargs)
        compiling = is_compiling()  # then the compiler decides what is kept
        if not compiling and torch.jit.is_tracing():
            return self._run_template(self.weights(), method, *args, **kwargs)
        factor = self.gradient.factor(self.turn)
        if self.operator.repeatable:  # its weights are few, so they are made once and kept
            run = partial(self._run_template, self.weights(factor), method)
        else:
            run = partial(self._make_weights_and_run, factor, method)
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        if self.checkpointed and not compiling:
            out = checkpoint(run, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)
        else:
            out = run(*args, **kwargs)
        if factor == 0:
            out = with_zero_gradients(out, self.own_parameters().values())
        if self.output_made_again and not compiling and args and isinstance(out, Tensor):
            can_be_made_again(out, partial(run, *args, **kwargs), args[0])
        return out

    def _make_weights_and_run(self, factor: int, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._run_template(self.weights(factor), method, *args, **kwargs)

    def _run_template(self, weights: dict[str, Tensor], method: str, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if is_compiling() else self.lock:
            return self.operator(self.template, weights | self._direct_parameters(), method, *args, **kwargs)

    def _direct_parameters(self) -> dict[str, nn.Parameter]:
        """Of what stays the block's own, that which stands in the block itself and in none of its submodules."""
        return {name: parameter for name, parameter in self._parameters.items() if name in self.untouched}

    @property
    def checkpointed(self) -> bool:
        """Whether it keeps nothing but its input for backward."""
        return self.gradient.recompute is True or self.removed.with_cp

    @property
    def with_cp(self) -> bool:
        """MMDetection's name for a block that keeps nothing but its input."""
        return self.removed.with_cp

    @with_cp.setter
    def with_cp(self, value: bool) -> None:
        self.removed = replace(self.removed, with_cp=bool(value))

    @property
    def output_made_again(self) -> bool:
        """Whether the block after it needn't keep its output."""
        return self.operator.repeatable and self.gradient.recompute is not False

    def _contexts(self) -> tuple[Any, Any]:
        """What an activation checkpoint runs the layer in the first time, and when it is run again."""
        return nullcontext(), statistics_stay(self.template)

    @torch.no_grad()
    def to_block(self) -> nn.Module:
        """What the operator runs, with plain weights. Takes the template over: the layer is spent afterwards.

        Raises:
            ValueError: a made weight isn't finite.
        """
        tensors = self.weights()
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f'the synthesised {name} has non-finite values')
        made = {name: nn.Parameter(tensor.clone(), requires_grad=self.removed.learned.get(name, True))
                for name, tensor in tensors.items()}
        take_parameters_(self.template, made | self._direct_parameters())
        if hasattr(self.template, 'with_cp'):
            self.template.with_cp = self.removed.with_cp
        return self.template

    def extra_repr(self) -> str:
        return f'for={type(self.template).__name__}, {self.fusion}, {self.operator}, {self.gradient}'


def computing_layers(model: nn.Module) -> dict[str, ComputingLayer]:
    """The computing layers of ``model`` by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ComputingLayer)}


def set_step_(model: nn.Module, step: int, staggered: bool = True) -> None:
    """Say which step of the training comes next, so that each replaced block knows whether it learns in it.

    Block number j of n learns in the steps t with :math:`(t + ⌊jk/n⌋) \\bmod k = 0`, k being the gradient's ``every``.
    A training that goes on at step t is then the same as one that was never interrupted.

    Args:
        model: with computing layers; call it before every step.
        step: t, from 0 on.
        staggered: blocks take turns. False lets all of them learn in the same steps: a model compiled as a whole then
            has two graphs, one for each kind of step.
    """
    layers = computing_layers(model).values()
    for number, layer in enumerate(layers):
        every = layer.gradient.every
        layer.turn = (step + (number * every // len(layers) if staggered else 0)) % every == 0


def _tensor(block: nn.Module, name: str) -> Tensor:
    """A block's parameter, or the plain tensor that ``torch.func.functional_call`` put in its place."""
    try:
        owner, slot = slot_of(block, name)
        tensor = owner._parameters.get(slot)  # as a rule; getattr looks for everything else first
        return getattr(owner, slot) if tensor is None else tensor
    except (KeyError, AttributeError):
        raise RuntimeError(f'a kept {type(block).__name__} has lost its {name}, of which a replaced block\'s is made; '
                           'materialize() the model before it is fused or changed in another way') from None


def _save_shared_once(layer: ComputingLayer, state: dict, prefix: str, *_: Any) -> None:
    """State-dict hook: what a layer beside its block has in common with it is saved with the block alone."""
    for name in layer.untouched if layer.provisional else ():
        state.pop(f'{prefix}{name}', None)
