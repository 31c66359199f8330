"""What every RL backbone has in common: the argument ``replacement``."""
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...replacement import ReplacementReport, replace_blocks_


class ReplacementMixin:
    """Adds the argument ``replacement`` to a backbone; everything else stays its parent's business.

    Args:
        replacement: settings of :func:`~rl_mmdet.replacement.replace_blocks_`. None leaves the parent as it is.
        *args, **kwargs: the parent's arguments.

    Attributes:
        replacement_report: what was replaced and why other blocks were not; None without replacement.
    """

    def __init__(self, *args: Any, replacement: dict | None = None, **kwargs: Any) -> None:
        with assertions_named(type(self).__name__):
            super().__init__(*args, **kwargs)
        self.replacement_report = None if replacement is None else replace_in_backbone_(self, replacement)


def replace_in_backbone_(backbone: nn.Module, replacement: Mapping[str, Any]) -> ReplacementReport:
    """:func:`~rl_mmdet.replacement.replace_blocks_`, with the backbone's ``frozen_stages`` frozen first.

    Some of mmdet's backbones freeze them no earlier than in ``train()``, and plans leave frozen stages alone.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.train()
    for module, mode in modes:
        module.training = mode
    return replace_blocks_(backbone, replacement)


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
