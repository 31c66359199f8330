"""Replacement Learning for any backbone."""
import difflib
from collections.abc import Mapping
from typing import Any

from mmdet.registry import MODELS
from torch import nn

from ..layouts import add_layout_hook
from .replacement_mixin import (
    ReplacementMixin,
    assertions_named,
    fold_norm_in_backbone_,
    replace_in_backbone_,
    set_transfer_,
)
from .rl_resnet import RLResNet, RLResNetV1d, RLResNeXt
from .rl_swin import RLSwin
from .timm_backbone import RLTimmBackbone

NAMED = {cls.__mro__[cls.__mro__.index(ReplacementMixin) + 1]: cls
         for cls in (RLResNet, RLResNetV1d, RLResNeXt, RLSwin)}
"""The backbones that have an RL class of their own."""


@MODELS.register_module()
def RLBackbone(backbone: str | type | Mapping[str, Any] | None = None, *, timm: str | None = None,  # noqa: N802
               replacement: Mapping[str, Any] | None = None, fold_norm: bool = False,
               transfer: Mapping[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """Build any backbone and replace blocks of it.

    What comes back *is* that backbone: its class, attributes, state-dict keys and outputs, with computing layers
    where blocks were, and the report in the attribute ``replacement_report``. Chains are found by structure
    (:func:`~rl_mmdet.replacement.find_chains`).

    Args:
        backbone: a config dict, or just the type, of a backbone in mmdet's registry (``'ResNeSt'``) or another's
            (``'mmpretrain.ConvNeXt'``, where mmpretrain is installed).
        timm: instead of ``backbone``, the name of a timm model; see
            :class:`~rl_mmdet.models.backbones.timm_backbone.TimmBackbone` for its arguments.
        replacement: settings of :func:`~rl_mmdet.replacement.replace_blocks_`; None replaces nothing.
        fold_norm: keep less for backward where BatchNorm is in eval mode; needs ``norm_eval=True`` where the backbone
            has it. See :mod:`~rl_mmdet.folding.fold_norm`.
        transfer: which of its tensors are updated; see :mod:`rl_mmdet.search.transfers`. None for all.
        **kwargs: the backbone's arguments, so that a config that inherits them changes only its ``type``.

    Raises:
        ValueError: neither or both of ``backbone`` and ``timm``, an unknown type, a backbone without chains, or
            whatever the backbone or the replacement refuses.

    Example:
        >>> RLBackbone('ResNeSt', depth=50, replacement=dict(plan=dict(type='EveryKth', k=2)))
        >>> RLBackbone(timm='convnext_tiny', replacement=dict(plan=dict(type='EveryKth', k=3)))
    """
    if (backbone is None) == (timm is None):
        raise ValueError("RLBackbone takes either backbone=dict(type='ResNeSt', ...) or timm='convnext_tiny'")
    if timm is not None:
        return RLTimmBackbone(timm, replacement=replacement, fold_norm=fold_norm, transfer=transfer, **kwargs)
    cfg = dict(backbone) if isinstance(backbone, Mapping) else dict(type=backbone)
    twice = sorted(cfg.keys() & kwargs.keys())
    if twice:
        raise ValueError(f'RLBackbone: {", ".join(twice)} is given both in backbone and beside it; leave one out')
    cfg.update(kwargs)
    cls = _class_of(cfg.pop('type', None))
    cls = NAMED.get(cls, cls)
    if isinstance(cls, type) and issubclass(cls, ReplacementMixin):
        return cls(**cfg, replacement=replacement, fold_norm=fold_norm, transfer=transfer)
    with assertions_named(cls.__name__):
        built = cls(**cfg)
    built.replacement_report = None
    if replacement is not None:
        built.replacement_report = replace_in_backbone_(built, replacement)
        add_layout_hook(built)
    if fold_norm:
        fold_norm_in_backbone_(built)
    set_transfer_(built, transfer)
    return built


def _class_of(name: Any) -> Any:
    if not isinstance(name, str):
        if callable(name):
            return name
        raise ValueError(f'RLBackbone: backbone must name a type, got {name!r}')
    cls = MODELS.get(name)
    if cls is None:
        known = difflib.get_close_matches(name, [key for key in MODELS.module_dict if isinstance(key, str)], n=3)
        raise ValueError(f'RLBackbone: unknown backbone type {name!r}'
                         + (f'; did you mean {", ".join(known)}?' if known else '')
                         + ("; is its package installed, and named in front, as in 'mmpretrain.ConvNeXt'?"
                            if '.' in name or not known else ''))
    return cls
