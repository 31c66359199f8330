"""Swin Transformer with Replacement Learning."""
from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.models.backbones import SwinTransformer
from mmdet.registry import MODELS

from ..layouts import add_layout_hook, read_pretrained
from .replacement_mixin import ReplacementMixin, check_init_cfg, check_stages


@MODELS.register_module()
class RLSwin(ReplacementMixin, SwinTransformer):
    """:class:`mmdet.models.SwinTransformer` with Replacement Learning.

    A replaced block keeps its own window shift; all of its parameters are fused, the relative-position table
    included. In a stage of depth 2 no block can be replaced. Weights may come in mmdet's, Swin's original or timm's
    layout, whatever ``convert_weights`` says; position tables of another window size are interpolated.

    Example:
        >>> backbone = RLSwin(depths=(2, 2, 18, 2), replacement=dict(plan=dict(type='EveryKth', k=2)))
    """

    def __init__(self, *args: Any, depths: Sequence[int] = (2, 2, 6, 2), out_indices: Sequence[int] = (0, 1, 2, 3),
                 frozen_stages: int = -1, init_cfg: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        check_stages(type(self).__name__, len(depths), out_indices, frozen_stages)
        check_init_cfg(type(self).__name__, init_cfg)
        super().__init__(*args, depths=depths, out_indices=out_indices, frozen_stages=frozen_stages, init_cfg=init_cfg,
                         **kwargs)
        if self.replacement_report is None:  # with replacement, the mixin has added it
            add_layout_hook(self)

    def init_weights(self) -> None:
        """Load ``init_cfg``'s checkpoint, or initialise as the parent does without one."""
        if self.init_cfg is None:
            super().init_weights()
        else:
            self.load_state_dict(read_pretrained(self.init_cfg), strict=False)
