"""The arguments that every RL backbone has: ``replacement``, ``fold_norm`` and ``transfer``."""
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import MessageHub, print_log
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..._torch_compat import is_compiling
from ...folding import fold_norm_
from ...replacement import ComputingLayer, ReplacementReport, computing_layers, replace_blocks_, stale_norms
from ...replacement.registry import build_setting
from ...search import TRANSFERS
from ..layouts import add_layout_hook

ARGUMENTS = ('replacement', 'fold_norm', 'transfer')
"""What an RL backbone takes beside its parent's arguments."""


class ReplacementMixin:
    """Adds three arguments to a backbone of mmdet; all others stay its parent's.

    Args:
        replacement: settings of :func:`~rl_mmdet.replacement.replace_blocks_`. None leaves the parent as it is.
        fold_norm: keep less for backward where a BatchNorm in eval mode follows a convolution, in replaced and other
            blocks alike, with the same gradients; see :mod:`~rl_mmdet.folding.fold_norm`.
        transfer: which tensors are updated, such as ``dict(type='SWR', budget=0.1)``; see
            :mod:`rl_mmdet.search.transfers`. None for all.
        **kwargs: the parent's arguments.

    Raises:
        ValueError: an argument that the parent asserts to be otherwise, or what :func:`apply_settings_` refuses.

    Attributes:
        replacement_report: what was replaced and why other blocks were not; None without replacement.
    """

    def __init__(self, *args: Any, replacement: Mapping[str, Any] | None = None, fold_norm: bool = False,
                 transfer: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        with assertions_named(type(self).__name__):
            super().__init__(*args, **kwargs)
        if replacement is not None:  # without it, loading is the parent's, too
            add_layout_hook(self)
        apply_settings_(self, replacement, fold_norm, transfer)


def apply_settings_(backbone: nn.Module, replacement: Mapping[str, Any] | None, fold_norm: bool,
                    transfer: Mapping[str, Any] | None) -> None:
    """Carry out the arguments of :class:`ReplacementMixin` on a backbone that is built.

    Raises:
        ValueError: a replacement or a transfer that doesn't fit the backbone; ``fold_norm`` that isn't a truth value,
            with ``norm_eval=False``, or where there is nothing to fold.
    """
    if not isinstance(fold_norm, bool):
        raise ValueError(f'fold_norm must be True or False, got {fold_norm!r}')
    backbone.replacement_report = None if replacement is None else replace_in_backbone_(backbone, replacement)
    if fold_norm:
        _fold_norm_in_backbone_(backbone)
    if transfer is not None:
        _set_transfer_(backbone, transfer)


def replace_in_backbone_(backbone: nn.Module, replacement: Mapping[str, Any]) -> ReplacementReport:
    """:func:`~rl_mmdet.replacement.replace_blocks_`, after the backbone has frozen its ``frozen_stages``.

    Plans leave frozen stages alone, but some of mmdet's backbones freeze them no earlier than in ``train()``.
    """
    _freeze_stages_(backbone)
    report = replace_blocks_(backbone, replacement)
    backbone.register_forward_pre_hook(_warn_of_what_is_missing)
    return report


def _warn_of_what_is_missing(backbone: nn.Module, _: Any) -> None:
    """Forward pre-hook: in the first step of MMEngine's training, log what the run lacks; then the hook is gone."""
    if is_compiling() or not (backbone.training and torch.is_grad_enabled()):
        return
    hooks = backbone._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _warn_of_what_is_missing]:
        del hooks[key]
    layers = computing_layers(backbone).values()
    lacks = {
        'StartHook': any(layer.fit_wanted for layer in layers) or bool(stale_norms(backbone)),
        'LearningStepsHook': any(layer.turn is None and layer.gradient.every > 1 for layer in layers),
        'optim_wrapper.constructor=RLOptimWrapperConstructor (or RLLayerDecayOptimWrapperConstructor), without which '
        'weight decay pulls replaced blocks to zero': any(layer.learned and not layer.undecayed for layer in layers)}
    missing = [name for name, is_missing in lacks.items() if is_missing]
    if missing and MessageHub.get_current_instance().get_info('max_iters') is not None:
        print_log(f'{type(backbone).__name__}: this training lacks {", ".join(missing)}; rl_mmdet\'s tools/train.py '
                  'adds them, for another one put them into the config (custom_hooks, optim_wrapper)', 'current',
                  logging.WARNING)


def _freeze_stages_(backbone: nn.Module) -> None:
    """Call the backbone's ``train()``, which freezes stages, and give all modules their modes back."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.train()
    for module, mode in modes:
        module.training = mode


def _fold_norm_in_backbone_(backbone: nn.Module) -> None:
    """:func:`~rl_mmdet.folding.fold_norm_`, unless the backbone's BatchNorm is to train."""
    trains = not getattr(backbone, 'norm_eval', True)
    if trains and any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        raise ValueError(f'{type(backbone).__name__}: fold_norm=True with norm_eval=False, but BatchNorm that trains '
                         'can\'t be folded; set norm_eval=True or leave fold_norm out')
    fold_norm_(backbone, lambda module: module.template if isinstance(module, ComputingLayer) else None)


def _set_transfer_(backbone: nn.Module, transfer: Mapping[str, Any]) -> None:
    """Let only the transfer's tensors learn; where it is to be learned which, all do until that is known."""
    chosen = build_setting(TRANSFERS, transfer, default='SWR', setting='transfer')
    if chosen.searches and hasattr(backbone, 'search_space'):
        raise ValueError(f'transfer: {chosen} and {backbone.search_space.plan} are two searches; learn the plan first, '
                         'then use the config that it saves')
    _freeze_stages_(backbone)
    try:
        chosen.prepare_(backbone)
    except ValueError as error:
        raise ValueError(f'transfer: {error}') from None
    backbone.transfer = chosen


@contextmanager
def assertions_named(name: str) -> Iterator[None]:
    """Turn an assertion that a backbone makes about its arguments into a ValueError that says which one failed."""
    try:
        yield
    except AssertionError as error:
        failed = traceback.extract_tb(error.__traceback__)[-1].line or ''
        raise ValueError(f'{name} refuses its arguments: {str(error) or failed}') from error


def check_stages(name: str, count: int, out_indices: Sequence[int], frozen_stages: int) -> None:
    """Raise a ValueError for outputs or frozen stages of a backbone that has only ``count`` stages."""
    wrong = [index for index in out_indices if not 0 <= index < count]
    if wrong:
        raise ValueError(f'{name}: out_indices {tuple(out_indices)} has {wrong[0]}, but there are {count} stages; '
                         f'allowed: 0 to {count - 1}')
    if frozen_stages > count:
        raise ValueError(f'{name}: frozen_stages={frozen_stages}, but there are {count} stages; allowed: -1 to {count}')


def check_init_cfg(name: str, init_cfg: Any) -> None:
    """Raise a ValueError where a backbone that initialises itself is given anything but a checkpoint or None."""
    if init_cfg is not None and (not isinstance(init_cfg, Mapping) or not init_cfg.get('checkpoint')):
        raise ValueError(f"{name}: init_cfg must be dict(type='Pretrained', checkpoint=FILE), got {init_cfg!r}")
