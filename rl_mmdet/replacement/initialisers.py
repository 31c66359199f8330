"""A backbone's ``init_weights`` may go through all modules and initialise what it takes for weights.

mmpretrain's ShuffleNets and Conformer do, and its ViT's blocks where ``only='ffn'`` is replaced.
"""
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from .chain import Chain
from .computing_layer import computing_layers


def give_stand_ins_(model: nn.Module, chains: dict[str, Chain]) -> None:
    """From now on ``init_weights`` finds tensors in replaced blocks, too; what it writes into them is lost.

    MMEngine's own asks whether there are weights, and stays as it is.
    """
    blocks = {id(block) for chain in chains.values() for block in chain.blocks}
    for module in model.modules():
        method = getattr(type(module), 'init_weights', None)
        ours = method is not None and not method.__module__.startswith('mmengine.')
        if ours and id(module) not in blocks and computing_layers(module):
            module.init_weights = partial(_init_weights, module)


def remove_stand_ins_(module: nn.Module) -> None:
    """Undo :func:`give_stand_ins_`; nothing happens to other modules."""
    if getattr(vars(module).get('init_weights'), 'func', None) is _init_weights:
        del module.init_weights


def _init_weights(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with ExitStack() as stack:
        for layer in computing_layers(module).values():
            stack.enter_context(layer.stand_ins())
        return type(module).init_weights(module, *args, **kwargs)
