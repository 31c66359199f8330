"""The computing layer: the module that stands where a block was."""
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .chain import Chain, all_parameters
from .fusions import Pair


class ComputingLayer(nn.Module):
    r"""Stands where a block was and makes its weights from the nearest kept blocks.

    .. math:: h_{out} = C\big(h_{in};\; T(θ_p, θ_n)\big)

    with the fusion :math:`T` and the operator :math:`C`. Its state are the fusion's parameters and the removed
    block's buffers under their old names (BatchNorm running statistics), nothing else: the neighbours are
    referenced, not owned, and so are moved, saved and copied where they stand. ``copy.deepcopy`` of a model
    yields computing layers that point into the copy.

    Args:
        chain, index: the block to remove. It is taken over: its parameters are dropped, its buffers kept.
        replaced: indices of all blocks of the chain that are replaced.
        fusion, operator, gradient: see their modules.

    Sources: arXiv 2410.01239 (RL-v1), arXiv 2605.19533 (RL-v2, "computing layer").
    """

    def __init__(self, chain: Chain, index: int, replaced: Collection[int], *, fusion: Any, operator: Any,
                 gradient: Any) -> None:
        super().__init__()
        blocks = chain.blocks
        block = blocks[index]
        self.fusion = fusion
        self.operator = operator
        self.gradient = gradient
        sources = chain.sources(index, replaced)
        # The two nearest kept blocks first; a tensor that has another size there comes from one further away.
        wanted = list(dict.fromkeys([*chain.neighbours(index, replaced), *(i for sides in sources.values()
                                                                           for i in sides if i is not None)]))
        self.sources = {name: tuple(None if i is None else wanted.index(i) for i in sides)
                        for name, sides in sources.items()}
        self.shapes = {name: p.shape for name, p in all_parameters(block)}
        self.learned = {name: p.requires_grad for name, p in all_parameters(block)}
        self.checkpointed = bool(getattr(block, 'with_cp', False))
        self.norm_stale = True
        """The weights are new and BatchNorm's running statistics still the removed block's."""
        like = next(block.parameters())
        for name, parameter in fusion.new_parameters(like.device, like.dtype).items():
            self.register_parameter(name, parameter)
        _drop_parameters(block)
        if self.checkpointed:
            block.with_cp = False  # done around the whole layer instead: the weights exist only while it runs
        # In a tuple these modules are no children of this one. The template's children and buffers *are*
        # this layer's, in the same dicts, so that whoever swaps or moves them does it for both.
        self._blocks = (block, *(blocks[i] for i in wanted))
        self._modules = block._modules
        self._buffers = block._buffers
        self._non_persistent_buffers_set = block._non_persistent_buffers_set
        self.training = block.training

    @property
    def template(self) -> nn.Module:
        """The removed block, whose parameters are all None."""
        return self._blocks[0]

    @property
    def before(self) -> nn.Module:
        return self._blocks[1]

    @property
    def after(self) -> nn.Module:
        return self._blocks[2]

    @property
    def kept(self) -> tuple[nn.Module, ...]:
        """The kept blocks whose tensors are used; ``sources`` counts in them. The first two are the neighbours."""
        return self._blocks[1:]

    def pairs(self) -> dict[str, Pair]:
        """The two tensors of kept blocks, before and after, for every parameter of the removed block."""
        return {name: tuple(None if i is None else _tensor(self.kept[i], name) for i in sides)
                for name, sides in self.sources.items()}

    def synthesise(self, detach: bool = False) -> dict[str, Tensor]:
        """The removed block's tensors, made by the fusion.

        Args:
            detach: cut the neighbours off, so that only the fusion's parameters get gradient.
        """
        pairs = self.pairs()
        if detach:
            pairs = {name: tuple(t if t is None else t.detach() for t in pair) for name, pair in pairs.items()}
        return self.fusion.fuse(self._parameters, pairs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same inputs, outputs and shapes as the removed block."""
        return self._run('forward', *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """The removed block's other ways forward, such as ``rfp_forward`` of DetectoRS, on the fused tensors."""
        if 'forward' in name and '_blocks' in self.__dict__ and callable(getattr(type(self.template), name, None)):
            return partial(self._run, name)
        return super().__getattr__(name)

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.gradient.run, self, method, *args, use_reentrant=False, **kwargs)
        return self.gradient.run(self, method, *args, **kwargs)

    def train(self, mode: bool = True) -> 'ComputingLayer':
        self.template.training = mode
        return super().train(mode)

    @torch.no_grad()
    def to_block(self) -> nn.Module:
        """The removed block with plain weights again. Takes the template over: the layer is spent afterwards.

        Raises:
            ValueError: a synthesised tensor isn't finite.
        """
        tensors = self.synthesise()
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f'the synthesised {name} has non-finite values')
        for name, tensor in tensors.items():
            owner, _, slot = name.rpartition('.')
            parameter = nn.Parameter(tensor.clone(), requires_grad=self.learned[name])
            module = self.template.get_submodule(owner)
            module._parameters[slot] = parameter
            for method in ('reset_parameters', '_load_from_state_dict'):
                module.__dict__.pop(method, None)
        if self.checkpointed:
            self.template.with_cp = True
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
