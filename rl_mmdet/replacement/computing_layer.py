"""The computing layer: the module that stands where a block was."""
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .chain import Chain, Choice, all_parameters
from .fusions import Pair
from .operators import FullBlock
from .rebuild import Rebuilt
from .recipe import recipe_of
from .resize import resize


class ComputingLayer(nn.Module):
    r"""Stands where a block was and makes its weights from the nearest kept blocks.

    .. math:: h_{out} = C\big(h_{in};\; T(θ_p, θ_n)\big)

    with the fusion :math:`T` and the operator :math:`C`. Its state are their parameters and the buffers of what
    the operator runs, under the removed block's names where it is that block (BatchNorm running statistics), nothing
    else: the neighbours are referenced, not owned, and so are moved, saved and copied where they stand.
    ``copy.deepcopy`` of a model yields computing layers that point into the copy.

    Args:
        chain, index: the block to remove. It is taken over: its parameters are dropped.
        choice: all blocks that are replaced, by chain name.
        block: a block to take over instead of the chain's, which stays; a copy of it.
        fusion, operator, gradient: see their modules.

    Sources: arXiv 2410.01239 (RL-v1), arXiv 2605.19533 (RL-v2, "computing layer").
    """

    def __init__(self, chain: Chain, index: int, choice: Choice, *, fusion: Any, operator: Any,
                 gradient: Any, block: nn.Module | None = None) -> None:
        super().__init__()
        block = chain.blocks[index] if block is None else block
        self.fusion = fusion
        self.operator = operator
        self.gradient = gradient
        self.shapes = {name: p.shape for name, p in all_parameters(block)}
        """Of all tensors of the removed block."""
        self.made = chain.shapes_to_make(index)
        """The tensors that the fusion makes, and their shapes."""
        kept = self._find_sources(chain, index, choice)
        self.learned = {name: p.requires_grad for name, p in all_parameters(block)}
        self.dropped = set(dict(block.named_buffers()))
        """Names of the removed block's buffers that the operator has no use for."""
        self.with_cp = bool(getattr(block, 'with_cp', False))
        self.checkpointed = self.with_cp or gradient.memory == 'recompute'
        self.rebuilt: Rebuilt | None = None
        """How the last output is made again, until the block after this one takes it; see :func:`~.rebuild.follow`."""
        self.followed = False
        self.recipe = recipe_of(block) if gradient.sample is not None and isinstance(operator, FullBlock) else None
        """How the block is computed, where its gradient is sampled and it can be run as a whole."""
        self.recipe_agrees: bool | None = None
        self.has_rows = any(isinstance(module, nn.Conv2d) for module in block.modules())
        self.warned = False
        self.again: Callable[[Tensor], Tensor] | None = None
        """What makes the last output again, left by a gradient that can."""
        self.norm_stale = True
        """The weights are new and BatchNorm's running statistics still the removed block's."""
        like = next(block.parameters())
        self._own = operator.new_parameters(block)
        learned = fusion.new_parameters(self.made, like.device, like.dtype) if self.made else {}
        for name, parameter in (learned | self._own).items():
            self.register_parameter(name, parameter)
        self._own = {name: parameter.detach().clone() for name, parameter in self._own.items()}
        if hasattr(block, 'with_cp'):
            block.with_cp = False  # done around the whole layer instead: the weights exist only while it runs
        template = operator.template(block)
        template.training = block.training
        self.dropped -= set(dict(template.named_buffers()))
        self.template_has_weights = any(True for _ in template.parameters())
        _drop_parameters(block)
        _drop_parameters(template)
        # In a tuple these modules are no children of this one. The template's children and buffers *are*
        # this layer's, in the same dicts, so that whoever swaps or moves them does it for both.
        self._blocks = (template, *kept)
        self._modules = template._modules
        self._buffers = template._buffers
        self._non_persistent_buffers_set = template._non_persistent_buffers_set
        self.training = template.training

    def _find_sources(self, chain: Chain, index: int, choice: Choice) -> list[nn.Module]:
        """The kept blocks: the neighbours, then those further away that have a tensor of the right size."""
        sources, neighbours = chain.sources(index, choice), chain.neighbours(index, choice)
        used = [place for sides in (neighbours, *sources.values()) for place in sides if place is not None]
        places = list(dict.fromkeys(used))
        self.sources = {name: tuple(None if place is None else places.index(place) for place in sides)
                        for name, sides in sources.items()}
        self._neighbours = tuple(None if place is None else places.index(place) for place in neighbours)
        return [place.block for place in places]

    def rebind(self, chain: Chain, index: int, choice: Choice) -> None:
        """Take the weights from the kept blocks that are nearest with another choice. Arguments as in the class."""
        self._blocks = (self.template, *self._find_sources(chain, index, choice))

    @property
    def template(self) -> nn.Module:
        """What the operator runs: the removed block or something lighter; its parameters are all None."""
        return self._blocks[0]

    @property
    def before(self) -> nn.Module | None:
        return None if self._neighbours[0] is None else self.kept[self._neighbours[0]]

    @property
    def after(self) -> nn.Module | None:
        return None if self._neighbours[1] is None else self.kept[self._neighbours[1]]

    @property
    def kept(self) -> tuple[nn.Module, ...]:
        """The kept blocks whose tensors are used; ``sources`` counts in them. The neighbours come first."""
        return self._blocks[1:]

    def pairs(self, names: Collection[str] | None = None) -> dict[str, Pair]:
        """The two tensors of kept blocks, before and after, for every tensor to make or just those, in its shape."""
        return {name: tuple(None if tensor is None else self.read(name, tensor) for tensor in pair)
                for name, pair in self._sources().items() if names is None or name in names}

    def _sources(self) -> dict[str, Pair]:
        """As :meth:`pairs`, each in its own shape."""
        return {name: tuple(None if i is None else _tensor(self.kept[i], name) for i in sides)
                for name, sides in self.sources.items()}

    def read(self, name: str, tensor: Tensor) -> Tensor:
        """What the operator needs of a tensor of this name, which is in the removed block's size or in another one."""
        return self.operator.read(resize(name, tensor, self.shapes[name]), self.made[name])

    def synthesise(self, detach: bool = False, parameters: dict[str, Tensor] | None = None,
                   names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The tensors of the removed block that the operator needs, made by the fusion.

        Args:
            detach: cut the neighbours off, so that only the fusion's parameters get gradient.
            parameters: values for the fusion's parameters, in place of the layer's own.
            names: of those to make, all by default.
        """
        pairs = self.pairs(names)
        if detach:
            pairs = {name: tuple(t if t is None else t.detach() for t in pair) for name, pair in pairs.items()}
        return self.fusion.fuse(parameters or self._parameters, pairs, self.made) if pairs else {}

    def weights(self, detach: bool = False, parameters: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All weights of what the operator runs, from the synthesised tensors. Arguments as there."""
        return self.operator.weights(self.template, self.synthesise(detach, parameters),
                                     parameters or self._parameters)

    def start_of_operator(self) -> dict[str, Tensor]:
        """The values from which the operator's own parameters start."""
        return dict(self._own)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same inputs, outputs and shapes as the removed block."""
        return self._run('forward', *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """The removed block's other ways forward, such as ``rfp_forward`` of DetectoRS, on the fused tensors."""
        if 'forward' in name and '_blocks' in self.__dict__ and callable(getattr(type(self.template), name, None)):
            return partial(self._run, name)
        return super().__getattr__(name)

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.gradient.run(self, method, *args, **kwargs)
        if self.checkpointed and not self.gradient.recomputes(self, method):
            out = checkpoint(self.gradient.run, self, method, *args, use_reentrant=False, **kwargs)
        else:
            out = self.gradient.run(self, method, *args, **kwargs)
        if self.followed and args and not torch.compiler.is_compiling():
            again = self._again(method, args[1:], kwargs)
            statistics = self.recipe.fixed_statistics(self.template) if self.recipe else []
            self.rebuilt = again and Rebuilt(out, again, args[0], [*self.used_tensors(), *self._parameters.values(),
                                                                   *statistics])
        return out

    def _again(self, method: str, args: tuple, kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
        """What makes the output just made again, given the input; None if nothing can."""
        again, self.again = self.again, None
        if self.operator.repeatable:
            return lambda inputs: self.gradient.run(self, method, inputs, *args, **kwargs)
        return again

    @property
    def way(self) -> str | None:
        """How its gradient is sampled: ``'block'``, as a whole, ``'layers'``, layer by layer; None if it isn't."""
        if self.gradient.sample is None or not self.template_has_weights:
            return None
        return 'layers' if self.recipe is None else 'block'

    def used_tensors(self) -> list[Tensor]:
        """The kept blocks' tensors that the layer's are made of."""
        return [tensor for pair in self._sources().values() for tensor in pair if tensor is not None]

    @property
    def rebuilds(self) -> bool:
        """Whether the output is to be made again in backward instead of being kept, if a block follows in the chain."""
        able = self.operator.repeatable or self.recipe is not None
        return able and self.gradient.memory in ('rebuild', 'recompute')

    def train(self, mode: bool = True) -> 'ComputingLayer':
        self.template.training = mode
        return super().train(mode)

    @torch.no_grad()
    def to_block(self) -> nn.Module:
        """What the operator runs, with plain weights. Takes the template over: the layer is spent afterwards.

        Raises:
            ValueError: a synthesised tensor isn't finite.
        """
        tensors = self.weights()
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f'the synthesised {name} has non-finite values')
        for name, tensor in tensors.items():
            owner, _, slot = name.rpartition('.')
            parameter = nn.Parameter(tensor.clone(), requires_grad=self.learned.get(name, True))
            module = self.template.get_submodule(owner)
            module._parameters[slot] = parameter
            for method in ('reset_parameters', '_load_from_state_dict'):
                module.__dict__.pop(method, None)
        if hasattr(self.template, 'with_cp'):
            self.template.with_cp = self.with_cp
        return self.template

    def extra_repr(self) -> str:
        return f'for={type(self.template).__name__}, {self.fusion}, {self.operator}, {self.gradient}'


def _tensor(block: nn.Module, name: str) -> Tensor:
    """A block's parameter, or the plain tensor that ``torch.func.functional_call`` put in its place."""
    owner, _, slot = name.rpartition('.')
    return getattr(block.get_submodule(owner), slot)


def _drop_parameters(block: nn.Module) -> None:
    """Set every parameter slot to None, which initialisers, state dicts and ``parameters()`` all skip."""
    for name, _ in list(all_parameters(block)):
        owner, _, slot = name.rpartition('.')
        module = block.get_submodule(owner)
        module._parameters[slot] = None
        module.reset_parameters = _nothing_to_reset  # torch's own would ask None for its shape
        if loads_its_own_way(module):  # and such a loader would ask None for its statistics
            module._load_from_state_dict = partial(nn.Module._load_from_state_dict, module)


def loads_its_own_way(module: nn.Module) -> bool:
    """Whether the module's class has a loader that isn't torch's, as convolutions with weight standardisation have."""
    return not type(module)._load_from_state_dict.__module__.startswith('torch.')


def _nothing_to_reset() -> None:
    """In the place of a template's ``reset_parameters``."""
