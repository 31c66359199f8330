"""Surgery: put computing layers where blocks were, and turn them into plain blocks again."""
import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .chain import Chain, find_chains
from .computing_layer import ComputingLayer
from .fold_norm import unfold_norm_
from .fusions import OwnWeights
from .gated_block import GatedBlock
from .gradients import build_gradient
from .operators import FullBlock
from .plans import Choice, describe_replaceable
from .pretrained import add_pretrained_hook, remove_pretrained_hook
from .rebuild import follow_in_chain, stop_following
from .recipe import recipe_of
from .references import always_run_
from .registry import FUSIONS, OPERATORS, PLANS, build_part
from .report import ReplacementReport, describe_blocks, with_layers
from .search_space import SearchSpace

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
    if any(isinstance(module, GatedBlock) for module in model.modules()):
        raise ValueError('replacement: a plan is being learned for this model already; finish the search first')
    if computing_layers(model):
        raise ValueError('replacement: the model has computing layers already; materialize() it first')
    chains = find_chains(model, parts['fusion'].adapt, parts['operator'])
    if plan.searches:
        return _begin_search_(model, chains, plan, parts)
    try:
        choice = plan.choose(chains, model, parts)
        _check_choice(chains, choice, plan)
    except ValueError as error:
        said = str(error)  # a plan that tries a replacement may have met an error of another setting
        raise ValueError(said if said.startswith('replacement.') else f'replacement.plan: {said}') from None
    _check_fusion(chains, choice, parts['fusion'])
    _check_memory(chains, choice, parts)
    rows = describe_blocks(chains, choice)
    for name, indices in choice.items():
        _replace_in_chain_(chains[name], indices, choice, parts)
    rows = with_layers(rows, computing_layers(model))
    if isinstance(parts['fusion'], OwnWeights):
        blocks = _make_plain_(model)
        for block in blocks.values() if not parts['fusion'].learn else ():
            block.requires_grad_(False)
        rows = tuple(replace(row, learnable=sum(p.numel() for p in blocks[row.name].parameters() if p.requires_grad))
                     if row.name in blocks else row for row in rows)
    else:
        add_pretrained_hook(model)
    settings = {key: repr(part) for key, part in dict(plan=plan, **parts).items()}
    return ReplacementReport(rows, settings)


def computing_layers(model: nn.Module) -> dict[str, ComputingLayer]:
    """The computing layers of ``model`` by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ComputingLayer)}


def materialize(model: nn.Module) -> nn.Module:
    """Turn a replaced model into the ordinary one with plain weights.

    Returns:
        A new module whose outputs equal the replaced model's. With ``FullBlock`` it has the baseline's
        architecture, state-dict keys and shapes; with a light operator ordinary layers stand where the blocks were.
        Nothing in it folds norms (:func:`~.fold_norm.fold_norm_`) or is left out at random. ``model`` is left as it
        is; a model without computing layers is copied.

    Raises:
        ValueError: a synthesised weight isn't finite, the message names the block; or a plan is still being learned.
    """
    if isinstance(model, ComputingLayer):
        raise ValueError('materialize() takes the whole model: a computing layer alone has no place to stand in')
    _check_no_search(model)
    plain = copy.deepcopy(model)
    _make_plain_(plain)
    always_run_(plain)
    unfold_norm_(plain)
    return plain


def _make_plain_(model: nn.Module) -> dict[str, nn.Module]:
    """Put what runs in the place of every computing layer, with plain weights; returns these by name."""
    blocks = {}
    for name, layer in computing_layers(model).items():
        try:
            blocks[name] = layer.to_block()
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from None
    for name, block in blocks.items():
        parent, _, key = name.rpartition('.')
        model.get_submodule(parent)._modules[key] = block
    for module in model.modules():
        remove_pretrained_hook(module)
        stop_following(module)
    return blocks


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
    plan = build_part(PLANS, replacement['plan'], default='EveryKth')
    fusion = build_part(FUSIONS, replacement.get('fusion'), default='ScalarFusion')
    operator = build_part(OPERATORS, replacement.get('operator'), default='FullBlock')
    gradient = build_gradient(replacement.get('gradient'))
    if gradient.sample is not None and not fusion.learns:
        raise ValueError(f'replacement.gradient: sample estimates the gradient of what the fusion learns, and {fusion} '
                         'learns nothing; leave sample out')
    if gradient.memory == 'rebuild' and not operator.repeatable and gradient.sample is None:
        able = [name for name, cls in OPERATORS.module_dict.items() if cls.repeatable]
        raise ValueError(f"replacement.gradient: memory='rebuild' isn't possible with {operator} and plain autograd; "
                         f"use memory='recompute', add sample=0.125, or take one of the operators {', '.join(able)}")
    return plan, dict(fusion=fusion, operator=operator, gradient=gradient)


def _begin_search_(model: nn.Module, chains: Mapping[str, Chain], plan: Any,
                   parts: dict[str, Any]) -> ReplacementReport:
    """Put a computing layer beside every block that can be replaced."""
    if isinstance(parts['fusion'], OwnWeights):
        raise ValueError(f'replacement.plan: {plan} chooses what is made of other blocks\' weights, and '
                         f'{parts["fusion"]} makes nothing; take another fusion or plan')
    candidates = {name: chain.replaceable() for name, chain in chains.items()}
    _check_fusion(chains, candidates, parts['fusion'])
    _check_memory(chains, candidates, parts)
    try:
        _check_some(chains, candidates, plan)
        savings = plan.savings(chains, model, parts)
    except ValueError as error:
        raise ValueError(f'replacement.plan: {error}') from None
    space = SearchSpace(model, chains, plan, savings, parts)
    add_pretrained_hook(model)
    return ReplacementReport(space.rows, {key: repr(part) for key, part in dict(plan=plan, **parts).items()})


def _check_no_search(model: nn.Module) -> None:
    if any(isinstance(module, GatedBlock) for module in model.modules()):
        raise ValueError('a plan is still being learned for this model, so it isn\'t known which blocks are replaced; '
                         'finish the search first')


def _chosen(chains: Mapping[str, Chain], choice: Choice) -> Iterator[tuple[Chain, int]]:
    """The chain and the index of every chosen block."""
    for name, indices in choice.items():
        for index in indices:
            yield chains[name], index


def _check_some(chains: Mapping[str, Chain], choice: Choice, plan: Any) -> None:
    if not chains:
        raise ValueError('the model has no chain of blocks (no nn.Sequential or nn.ModuleList of residual units)')
    if not any(choice.values()):
        raise ValueError(f'{plan} replaces no block of this model; {describe_replaceable(chains)}')


def _check_choice(chains: Mapping[str, Chain], choice: Choice, plan: Any) -> None:
    for chain, index in _chosen(chains, choice):
        reason = chain.why_not(index, choice)
        if reason is not None:
            raise ValueError(f'{chain.name} block {index} can\'t be replaced: {reason}; '
                             f'{describe_replaceable(chains)}')
    _check_some(chains, choice, plan)


def _check_fusion(chains: Mapping[str, Chain], choice: Choice, fusion: Any) -> None:
    for chain, index in _chosen(chains, choice):
        try:
            fusion.check(chain.shapes_to_make(index))
        except ValueError as error:
            raise ValueError(f'replacement.fusion: {chain.block_name(index)}: {error}') from None


def _check_memory(chains: Mapping[str, Chain], choice: Choice, parts: dict[str, Any]) -> None:
    if parts['gradient'].memory != 'rebuild' or parts['operator'].repeatable:
        return
    for chain, index in _chosen(chains, choice):
        block = chain.blocks[index]
        if not isinstance(parts['operator'], FullBlock) or recipe_of(block) is None:
            raise ValueError(f"replacement.gradient: memory='rebuild' isn't possible for {chain.block_name(index)} "
                             f"({type(block).__name__}) with {parts['operator']}: only FullBlock is rebuilt, in the "
                             "place of convolutions in a row, each with a norm and a ReLU; use memory='masks', "
                             "'recompute', or None (the best for each block)")


def _replace_in_chain_(chain: Chain, indices: list[int], choice: Choice, parts: dict[str, Any]) -> None:
    for index in indices:
        chain.container._modules[chain.keys[index]] = ComputingLayer(chain, index, choice, **parts)
    follow_in_chain(chain, indices)
