"""Replacement Learning for any backbone."""
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt, SwinTransformer
from mmdet.registry import MODELS
from torch import nn

from ..layouts import add_layout_hook
from .replacement_mixin import ReplacementMixin, apply_settings_, assertions_named
from .rl_resnet import RLResNet, RLResNetV1d, RLResNeXt
from .rl_swin import RLSwin
from .timm_backbone import TimmBackbone

NAMED = {ResNet: RLResNet, ResNetV1d: RLResNetV1d, ResNeXt: RLResNeXt, SwinTransformer: RLSwin}
"""mmdet's backbones that have an RL class of their own."""


@MODELS.register_module(name='RLBackbone')
def build_rl_backbone(backbone: str | type | Mapping[str, Any] | None = None, *, timm: str | None = None,
                      replacement: Mapping[str, Any] | None = None, fold_norm: bool = False,
                      transfer: Mapping[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """Build any backbone and replace blocks of it; configs name it ``dict(type='RLBackbone', ...)``.

    What it returns *is* that backbone: its class, attributes, state-dict keys and outputs, with computing layers
    where blocks were, and the report in the attribute ``replacement_report``.

    Args:
        backbone: a config dict, or just the type, of a backbone in mmdet's registry (``'ResNeSt'``) or another's
            (``'mmpretrain.ConvNeXt'``, where mmpretrain is installed).
        timm: instead of ``backbone``, the name of a timm model; see
            :class:`~rl_mmdet.models.backbones.timm_backbone.TimmBackbone` for its arguments.
        replacement, fold_norm, transfer: as for
            :class:`~rl_mmdet.models.backbones.replacement_mixin.ReplacementMixin`.
        **kwargs: the backbone's arguments, so that a config that inherits them changes only its ``type``.

    Raises:
        ValueError: neither or both of ``backbone`` and ``timm``, an unknown type, a backbone without chains, or
            whatever the backbone or the replacement refuses.

    Example:
        >>> build_rl_backbone('ResNeSt', depth=50, replacement=dict(plan=dict(type='EveryKth', k=2)))
        >>> build_rl_backbone(timm='convnext_tiny', replacement=dict(plan=dict(type='EveryKth', k=3)))
    """
    if (backbone is None) == (timm is None):
        raise ValueError("RLBackbone takes either backbone=dict(type='ResNeSt', ...) or timm='convnext_tiny'")
    settings = dict(replacement=replacement, fold_norm=fold_norm, transfer=transfer)
    if timm is not None:
        return TimmBackbone(timm, **settings, **kwargs)
    cfg = dict(backbone) if isinstance(backbone, Mapping) else dict(type=backbone)
    twice = sorted(cfg.keys() & kwargs.keys())
    if twice:
        raise ValueError(f'RLBackbone: {", ".join(twice)} is given both in backbone and beside it; leave one out')
    cfg.update(kwargs)
    cls = _class_of(cfg.pop('type', None))
    cls = NAMED.get(cls, cls)
    if isinstance(cls, type) and issubclass(cls, (ReplacementMixin, TimmBackbone)):
        return cls(**cfg, **settings)
    with assertions_named(cls.__name__):
        built = cls(**cfg)
    if replacement is not None:  # without it, loading is the backbone's own
        add_layout_hook(built)
    apply_settings_(built, **settings)
    return built


def is_rl_backbone(kind: Any) -> bool:
    """Whether a registered type takes the arguments of Replacement Learning."""
    return kind is build_rl_backbone or isinstance(kind, type) and issubclass(kind, (ReplacementMixin, TimmBackbone))


def rl_type_of(name: Any, kind: Any) -> dict[str, Any]:
    """What a config says for an ordinary backbone to take them: ``kind`` is the registered type of this ``name``."""
    return dict(type=NAMED[kind].__name__) if kind in NAMED else dict(type='RLBackbone', backbone=name)


def _class_of(name: Any) -> Callable[..., nn.Module]:
    """The backbone class of that name in a registry; a class is returned as it is."""
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
