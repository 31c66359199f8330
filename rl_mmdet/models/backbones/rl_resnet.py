"""The ResNet family with Replacement Learning."""
from typing import Any

from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt
from mmdet.registry import MODELS

from ...replacement import replace_blocks_


class ReplacementMixin:
    """Adds the argument ``replacement`` to a backbone; everything else stays its parent's business.

    Args:
        replacement: settings of :func:`~rl_mmdet.replacement.replace_blocks_`. None leaves the parent as it is.
        *args, **kwargs: the parent's arguments.

    Attributes:
        replacement_report: what was replaced and why other blocks were not; None without replacement.
    """

    def __init__(self, *args: Any, replacement: dict | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replacement_report = None if replacement is None else replace_blocks_(self, replacement)


@MODELS.register_module()
class RLResNet(ReplacementMixin, ResNet):
    """:class:`mmdet.models.ResNet` with Replacement Learning.

    Example:
        >>> backbone = RLResNet(depth=50, replacement=dict(plan=dict(type='EveryKth', k=4)))
    """


@MODELS.register_module()
class RLResNetV1d(ReplacementMixin, ResNetV1d):
    """:class:`mmdet.models.ResNetV1d` (deep stem, average-pooled shortcuts) with Replacement Learning."""


@MODELS.register_module()
class RLResNeXt(ReplacementMixin, ResNeXt):
    """:class:`mmdet.models.ResNeXt` (grouped 3×3 convolutions) with Replacement Learning."""
