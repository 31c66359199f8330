"""Surgery: put computing layers where blocks were, and turn them into plain blocks again."""
import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from .chain import Chain, find_chains
from .computing_layer import ComputingLayer
from .gradients import build_gradient
from .plans import Choice, describe_replaceable
from .pretrained import add_pretrained_hook, remove_pretrained_hook
from .registry import FUSIONS, OPERATORS, PLANS, build_part
from .report import ReplacementReport, describe_blocks

SETTINGS = ('plan', 'fusion', 'operator', 'gradient')


def replace_blocks_(model: nn.Module, replacement: Mapping[str, Any]) -> ReplacementReport:
    """Replace blocks of ``model`` in place by computing layers.

    Args:
        model: any module with chains of blocks (see :func:`~rl_mmdet.replacement.chain.find_chains`); a
            detector's backbone rather than the whole detector.
        replacement: ``dict(plan=..., fusion=..., operator=..., gradient=...)``. Only ``plan`` is required; the
            others default to ``ScalarFusion``, ``FullBlock`` and ``dict(mode='detached')`` (RL-v1).

    The removed blocks' weights are gone and the fusions start as configured. To start from trained weights, keep
    the state dict, replace, then load it; BatchNorm in eval mode also wants
    :func:`~rl_mmdet.replacement.norms.recalibrate_norms_`.

    Returns:
        Which blocks were replaced, and why others were not.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: an unknown setting, type or block, a block that can't be replaced, or a plan that replaces
            nothing. The model is then untouched.

    Example:
        >>> report = replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2)))
    """
    plan, parts = _build_parts(replacement)
    if computing_layers(model):
        raise ValueError('replacement: the model has computing layers already; materialize() it first')
    chains = find_chains(model)
    try:
        choice = plan.choose(chains)
        _check_choice(chains, choice, plan)
    except ValueError as error:
        raise ValueError(f'replacement.plan: {error}') from None
    rows = describe_blocks(chains, choice)
    for name, indices in choice.items():
        _replace_in_chain_(chains[name], indices, parts)
    add_pretrained_hook(model)
    settings = {key: repr(part) for key, part in dict(plan=plan, **parts).items()}
    learnable = sum(p.numel() for layer in computing_layers(model).values()
                    for p in layer.parameters(recurse=False))
    return ReplacementReport(rows, settings, learnable)


def computing_layers(model: nn.Module) -> dict[str, ComputingLayer]:
    """The computing layers of ``model`` by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ComputingLayer)}


def materialize(model: nn.Module) -> nn.Module:
    """Turn a replaced model into the ordinary one with plain weights.

    Returns:
        A new module with the baseline's architecture, state-dict keys and shapes, whose outputs equal the
        replaced model's. ``model`` is left as it is; a model without computing layers is copied.

    Raises:
        ValueError: a synthesised weight isn't finite; the message names the block.
    """
    if isinstance(model, ComputingLayer):
        raise ValueError('materialize() takes the whole model: a computing layer alone has no place to stand in')
    plain = copy.deepcopy(model)
    blocks = {}
    for name, layer in computing_layers(plain).items():
        try:
            blocks[name] = layer.to_block()
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from None
    for name, block in blocks.items():
        parent, _, key = name.rpartition('.')
        plain.get_submodule(parent)._modules[key] = block
    for module in plain.modules():
        remove_pretrained_hook(module)
    return plain


def _build_parts(replacement: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The plan, and what each computing layer is made of."""
    if not isinstance(replacement, Mapping):
        raise TypeError("replacement must be a dict such as dict(plan=dict(type='EveryKth', k=4)), "
                        f'got {replacement!r}')
    for key in replacement:
        if key not in SETTINGS:
            raise ValueError(f'replacement: unknown setting {key!r}; allowed: {", ".join(SETTINGS)}')
    if replacement.get('plan') is None:
        raise ValueError("replacement: plan is missing; for instance plan=dict(type='EveryKth', k=4)")
    return build_part(PLANS, replacement['plan'], default='EveryKth'), dict(
        fusion=build_part(FUSIONS, replacement.get('fusion'), default='ScalarFusion'),
        operator=build_part(OPERATORS, replacement.get('operator'), default='FullBlock'),
        gradient=build_gradient(replacement.get('gradient')))


def _check_choice(chains: Mapping[str, Chain], choice: Choice, plan: Any) -> None:
    if not chains:
        raise ValueError('the model has no chain of blocks (no nn.Sequential or nn.ModuleList of residual units)')
    for name, indices in choice.items():
        for index in indices:
            reason = chains[name].why_not(index, indices)
            if reason is not None:
                raise ValueError(f'{name} block {index} can\'t be replaced: {reason}; '
                                 f'{describe_replaceable(chains)}')
    if not any(choice.values()):
        raise ValueError(f'{plan} replaces no block of this model; {describe_replaceable(chains)}')


def _replace_in_chain_(chain: Chain, indices: list[int], parts: dict[str, Any]) -> None:
    for index in indices:
        chain.container._modules[chain.keys[index]] = ComputingLayer(chain, index, indices, **parts)
