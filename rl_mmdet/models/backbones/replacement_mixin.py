"""What every RL backbone has in common: the arguments ``replacement`` and ``fold_norm``."""
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


class ReplacementMixin:
    """Adds ``replacement`` and ``fold_norm`` to a backbone's arguments; everything else stays its parent's business.

    Args:
        replacement: settings of :func:`~rl_mmdet.replacement.replace_blocks_`. None leaves the parent as it is.
        fold_norm: keep less for backward where a BatchNorm in eval mode follows a convolution, in replaced and other
            blocks alike, with the same gradients; see :mod:`~rl_mmdet.folding.fold_norm`.
        transfer: which of its tensors are updated, such as ``dict(type='SWR', budget=0.1)``; see
            :mod:`rl_mmdet.search.transfers`. None for all.
        *args, **kwargs: the parent's arguments.

    Raises:
        ValueError: ``fold_norm`` with ``norm_eval=False``, or where there is nothing to fold.

    Attributes:
        replacement_report: what was replaced and why other blocks were not; None without replacement.
    """

    def __init__(self, *args: Any, replacement: dict | None = None, fold_norm: bool = False,
                 transfer: dict | None = None, **kwargs: Any) -> None:
        with assertions_named(type(self).__name__):
            super().__init__(*args, **kwargs)
        self.replacement_report = None if replacement is None else replace_in_backbone_(self, replacement)
        if fold_norm:
            fold_norm_in_backbone_(self)
        set_transfer_(self, transfer)


def replace_in_backbone_(backbone: nn.Module, replacement: Mapping[str, Any]) -> ReplacementReport:
    """:func:`~rl_mmdet.replacement.replace_blocks_`, with the backbone's ``frozen_stages`` frozen first.

    Some of mmdet's backbones freeze them no earlier than in ``train()``, and plans leave frozen stages alone.
    """
    _freeze_stages_(backbone)
    return replace_blocks_(backbone, replacement)


def _freeze_stages_(backbone: nn.Module) -> None:
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.train()
    for module, mode in modes:
        module.training = mode


def set_transfer_(backbone: nn.Module, transfer: Mapping[str, Any] | None) -> None:
    """Let only the tensors of a transfer learn; if it is learned which, they all do until that is known.

    Raises:
        TypeError: not a dict.
        ValueError: an unknown type or argument, a transfer that doesn't fit the backbone, or one to be learned beside a
            plan that is to be learned.
    """
    if transfer is None:
        return
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


def fold_norm_in_backbone_(backbone: nn.Module) -> None:
    """:func:`~rl_mmdet.folding.fold_norm_`, unless the backbone's BatchNorm is to train.

    Raises:
        ValueError: it has ``norm_eval=False``, or nothing to fold.
    """
    trains = not getattr(backbone, 'norm_eval', True)
    if trains and any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        raise ValueError(f'{type(backbone).__name__}: fold_norm=True with norm_eval=False, but BatchNorm that trains '
                         'can\'t be folded; set norm_eval=True or leave fold_norm out')
    fold_norm_(backbone, lambda module: module.template if isinstance(module, ComputingLayer) else None)


@contextmanager
def assertions_named(name: str) -> Iterator[None]:
    """Turn an assertion that a backbone makes about its arguments into a ValueError that says which one failed."""
    try:
        yield
    except AssertionError as error:
        failed = traceback.extract_tb(error.__traceback__)[-1].line or ''
        raise ValueError(f'{name} refuses its arguments: {str(error) or failed}') from error


def check_out_indices(name: str, out_indices: Sequence[int], count: int, what: str = 'stages') -> None:
    """Raise a ValueError for output indices that don't exist."""
    wrong = [index for index in out_indices if not 0 <= index < count]
    if wrong:
        raise ValueError(f'{name}: out_indices {tuple(out_indices)} has {wrong[0]}, but there are {count} {what}; '
                         f'allowed: 0 to {count - 1}')


def check_frozen_stages(name: str, frozen_stages: int, count: int) -> None:
    """Raise a ValueError for more frozen stages than there are."""
    if frozen_stages > count:
        raise ValueError(f'{name}: frozen_stages={frozen_stages}, but there are {count} stages; allowed: -1 to {count}')


def check_init_cfg(name: str, init_cfg: Any) -> None:
    """Raise a ValueError where a backbone that initialises itself is given anything but a checkpoint or None."""
    if init_cfg is not None and (not isinstance(init_cfg, Mapping) or not init_cfg.get('checkpoint')):
        raise ValueError(f"{name}: init_cfg must be dict(type='Pretrained', checkpoint=FILE), got {init_cfg!r}")
