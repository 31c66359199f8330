"""The arguments that every RL backbone has: ``replacement``, ``fold_norm`` and ``transfer``."""
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...folding import fold_norm_
from ...replacement import ComputingLayer, ReplacementReport, replace_blocks_
from ...replacement.registry import build_setting
from ...search import TRANSFERS
from ..layouts import add_layout_hook


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
        ValueError: a replacement or a transfer that doesn't fit the backbone; ``fold_norm`` with ``norm_eval=False``,
            or where there is nothing to fold.
    """
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
    return replace_blocks_(backbone, replacement)


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
