"""Surgery: put computing layers where blocks were, and turn them into plain blocks again."""
import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .chain import Chain, Choice, describe_replaceable, find_chains
from .computing_layer import ComputingLayer, LayerSettings, computing_layers
from .fusions import OwnWeights
from .gradient import build_gradient
from .initialisers import give_stand_ins_, remove_stand_ins_
from .rebuild import drop_made_inputs_, keep_made_inputs_
from .registry import FUSIONS, OPERATORS, PLANS, STARTS, build_setting
from .report import ReplacementReport, describe_blocks, with_added
from .start.checkpoint import add_pretrained_hook, remove_pretrained_hook

SETTINGS = ('plan', 'fusion', 'operator', 'gradient', 'start')


def replace_blocks_(model: nn.Module, replacement: Mapping[str, Any]) -> ReplacementReport:
    """Replace blocks of ``model`` in place by computing layers.

    Args:
        model: any module with chains of blocks (see :func:`~rl_mmdet.replacement.find_chains`); a detector's backbone
            rather than the whole detector.
        replacement: ``dict(plan=..., fusion=..., operator=..., gradient=..., start=...)``. Only ``plan`` is
            required; the others default to ``ScalarFusion``, ``FullBlock``, ``dict(mode='detached')`` (RL-v1) and
            ``Average``.

    The removed blocks' weights are gone and the fusions start as configured. To start from trained weights, keep
    the state dict, replace, then load it; BatchNorm in eval mode also wants
    :func:`~rl_mmdet.replacement.recalibrate_norms_`.

    Returns:
        Which blocks were replaced, and why others were not.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: an unknown setting, type or block, a block that can't be replaced, or a plan that replaces
            nothing. The model is then untouched.

    Example:
        >>> report = replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2)))
    """
    plan, settings = _build_settings(replacement)
    if settings.start.keeps_block and isinstance(settings.fusion, OwnWeights):
        raise ValueError(f'replacement.start: {settings.start} fits computing layers, and OwnWeights has none; leave '
                         'start out')
    layers = computing_layers(model).values()
    if any(layer.provisional for layer in layers):
        raise ValueError('replacement: a plan is being learned for this model already; finish the search first')
    if layers:
        raise ValueError('replacement: the model has computing layers already; materialize() it first')
    chains = find_chains(model, settings.fusion.adapt, settings.operator)
    report = plan.carry_out_(model, chains, settings)
    if not isinstance(settings.fusion, OwnWeights):
        add_pretrained_hook(model)
        give_stand_ins_(model, chains)
    return replace(report, settings={key: repr(each) for key, each in dict(plan=plan, **settings._asdict()).items()})


def replace_chosen_(model: nn.Module, chains: Mapping[str, Chain], choice: Choice,
                    settings: LayerSettings) -> ReplacementReport:
    """Put computing layers in the place of the chosen blocks, which can be replaced together (:func:`check_choice`).

    Raises:
        ValueError: the fusion can't make a block's tensors. The model is then untouched.
    """
    check_fusion(chains, choice, settings.fusion)
    rows = describe_blocks(chains, choice)
    for name, indices in choice.items():
        chain = chains[name]
        for index in indices:
            chain.container._modules[chain.keys[index]] = ComputingLayer(chain, index, choice, settings)
        prepare_followers_(chain)
    if isinstance(settings.fusion, OwnWeights):
        return ReplacementReport(with_added(rows, _give_own_weights_(model, settings.fusion.learn)))
    added = {name: layer.own_parameters().values() for name, layer in computing_layers(model).items()}
    return ReplacementReport(with_added(rows, added))


def prepare_followers_(chain: Chain) -> None:
    """Let the blocks that follow a computing layer keep nothing that it can make again."""
    for layer, follower in zip(chain.blocks, chain.blocks[1:], strict=False):
        if isinstance(layer, ComputingLayer) and layer.output_made_again:
            drop_made_inputs_(follower)


def materialize(model: nn.Module) -> nn.Module:
    """Turn a replaced model into the ordinary one with plain weights.

    Returns:
        A new module whose outputs equal the replaced model's. With ``FullBlock`` it has the baseline's
        architecture, state-dict keys and shapes; with a light operator ordinary layers stand where the blocks were.
        ``model`` is left as it is; a model without computing layers is copied.

    Raises:
        ValueError: a synthesised weight isn't finite, the message names the block; or a plan is still being learned.
    """
    if isinstance(model, ComputingLayer):
        raise ValueError('materialize() takes the whole model: a computing layer alone has no place to stand in')
    if any(layer.provisional for layer in computing_layers(model).values()):
        raise ValueError('a plan is still being learned for this model, so it isn\'t known which blocks are replaced; '
                         'finish the search first')
    plain = copy.deepcopy(model)
    _make_plain_(plain)
    return plain


def check_choice(chains: Mapping[str, Chain], choice: Choice, plan: Any) -> None:
    """Raise a ValueError if a chosen block can't be replaced, or none is chosen (:func:`check_some`)."""
    for name, indices in choice.items():
        for index in indices:
            reason = chains[name].why_not(index, choice)
            if reason is not None:
                raise ValueError(f'{name} block {index} can\'t be replaced: {reason}; {describe_replaceable(chains)}')
    check_some(chains, choice, plan)


def check_some(chains: Mapping[str, Chain], choice: Choice, plan: Any) -> None:
    """Raise a ValueError if no block is chosen."""
    if not chains:
        raise ValueError('the model has no chain of blocks (no nn.Sequential or nn.ModuleList of residual units)')
    if not any(choice.values()):
        raise ValueError(f'{plan} replaces no block of this model; {describe_replaceable(chains)}')


def check_fusion(chains: Mapping[str, Chain], choice: Choice, fusion: Any) -> None:
    """Raise a ValueError if the fusion can't make the tensors of a chosen block."""
    for name, indices in choice.items():
        for index in indices:
            try:
                fusion.check(chains[name].shapes_to_make(index))
            except ValueError as error:
                raise ValueError(f'replacement.fusion: {chains[name].block_name(index)}: {error}') from None


def _build_settings(replacement: Mapping[str, Any]) -> tuple[Any, LayerSettings]:
    """The plan, and what all computing layers have in common."""
    if not isinstance(replacement, Mapping):
        raise TypeError("replacement must be a dict such as dict(plan=dict(type='EveryKth', k=4)), "
                        f'got {replacement!r}')
    for key in replacement:
        if key not in SETTINGS:
            raise ValueError(f'replacement: unknown setting {key!r}; allowed: {", ".join(SETTINGS)}')
    if replacement.get('plan') is None:
        raise ValueError("replacement: plan is missing; for instance plan=dict(type='EveryKth', k=4)")
    plan = build_setting(PLANS, replacement['plan'], default='EveryKth')
    fusion = build_setting(FUSIONS, replacement.get('fusion'), default='ScalarFusion')
    operator = build_setting(OPERATORS, replacement.get('operator'), default='FullBlock')
    start = build_setting(STARTS, replacement.get('start'), default='Average')
    return plan, LayerSettings(fusion, operator, build_gradient(replacement.get('gradient')), start)


def _give_own_weights_(model: nn.Module, learn: bool) -> dict[str, list[nn.Parameter]]:
    """Put plain weights in the place of those that are made; returns these by the block's name."""
    untouched = {name: set(layer.parameters()) for name, layer in computing_layers(model).items()}
    made = {name: [parameter for parameter in block.parameters() if parameter not in untouched[name]]
            for name, block in _make_plain_(model).items()}
    for parameter in [parameter for parameters in made.values() for parameter in parameters]:
        parameter.requires_grad_(parameter.requires_grad and learn)
    return made


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
        remove_stand_ins_(module)
        keep_made_inputs_(module)
    return blocks
