"""The ResNet family with Replacement Learning."""
from collections.abc import Sequence
from typing import Any

from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt
from mmdet.registry import MODELS

from .replacement_mixin import ReplacementMixin, check_stages


class _RLResNetBase(ReplacementMixin):
    """Explains what mmdet's ResNets refuse with a bare assertion."""

    def __init__(self, *args: Any, num_stages: int = 4, out_indices: Sequence[int] = (0, 1, 2, 3),
                 frozen_stages: int = -1, **kwargs: Any) -> None:
        check_stages(type(self).__name__, num_stages, out_indices, frozen_stages)
        super().__init__(*args, num_stages=num_stages, out_indices=out_indices, frozen_stages=frozen_stages, **kwargs)


@MODELS.register_module()
class RLResNet(_RLResNetBase, ResNet):
    """:class:`mmdet.models.ResNet` with Replacement Learning.

    Example:
        >>> backbone = RLResNet(depth=50, replacement=dict(plan=dict(type='EveryKth', k=4)))
    """


@MODELS.register_module()
class RLResNetV1d(_RLResNetBase, ResNetV1d):
    """:class:`mmdet.models.ResNetV1d` (deep stem, average-pooled shortcuts) with Replacement Learning.

    Takes weights in timm's layout, too (``resnet50d`` and its relatives).
    """


@MODELS.register_module()
class RLResNeXt(_RLResNetBase, ResNeXt):
    """:class:`mmdet.models.ResNeXt` (grouped 3×3 convolutions) with Replacement Learning."""
