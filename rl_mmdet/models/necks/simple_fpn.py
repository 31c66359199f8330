"""ViTDet's simple feature pyramid: several strides from one map."""
from collections.abc import Sequence

from mmcv.cnn import ConvModule, build_norm_layer
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT_MODELS
from torch import Tensor, nn
from torch.nn import functional as F


@ROOT_MODELS.register_module()  # where mmcv looks for norms, whatever the default scope
class LN2d(nn.LayerNorm):
    """LayerNorm over the channels of every pixel, for maps of shape ``(N, C, H, W)``.

    timm and torchvision have the same, but importing either one takes a second at every start.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """A pyramid from the one map of a plain ViT: scaled by 4, 2, 1 and 1/2, each projected on its own.

    Args:
        backbone_channel: channels of the map.
        in_channels: channels of the four scaled maps; these follow from ``backbone_channel`` (a quarter, half, all,
            all of it) and are only compared, for configs that state them.
        out_channels: channels of every level.
        num_outs: levels; those beyond four are max-pooled from the one before.
        norm_cfg: norm after the convolutions.
        act_cfg: activation after the convolutions, none by default.
        init_cfg: see :class:`mmengine.model.BaseModule`.

    Shapes:
        one map ``(N, backbone_channel, H, W)`` to ``num_outs`` maps ``(N, out_channels, H·4 / 2**i, W·4 / 2**i)``:
        strides 4, 8, 16, 32 and 64 for patches of 16 pixels.

    Raises:
        ValueError: ``in_channels`` that don't follow, fewer than four levels, more than one map.

    Source: "Exploring Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527, section 3.
    """

    def __init__(self, backbone_channel: int, out_channels: int = 256, num_outs: int = 5,
                 in_channels: Sequence[int] | None = None, norm_cfg: dict | None = None,
                 act_cfg: dict | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        half, quarter = backbone_channel // 2, backbone_channel // 4
        channels = [quarter, half, backbone_channel, backbone_channel]
        if in_channels is not None and list(in_channels) != channels:
            raise ValueError(f'SimpleFPN: in_channels {list(in_channels)} don\'t follow from backbone_channel='
                             f'{backbone_channel}; leave them out, or give {channels}')
        if num_outs < 4:
            raise ValueError(f'SimpleFPN: num_outs must be at least 4, got {num_outs}')
        self.num_outs = num_outs
        norm_cfg = norm_cfg or dict(type='LN2d')
        self.scales = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(backbone_channel, half, 2, 2), build_norm_layer(norm_cfg, half)[1],
                          nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)),
            nn.ConvTranspose2d(backbone_channel, half, 2, 2),
            nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
        ])
        settings = dict(norm_cfg=norm_cfg, act_cfg=act_cfg, bias=False)
        self.lateral_convs = nn.ModuleList(ConvModule(each, out_channels, 1, **settings) for each in channels)
        self.fpn_convs = nn.ModuleList(ConvModule(out_channels, out_channels, 3, padding=1, **settings)
                                       for _ in channels)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(inputs) != 1:
            raise ValueError(f'SimpleFPN takes one map, got {len(inputs)}; set the backbone\'s out_indices to one')
        levels = [fpn(lateral(scale(inputs[0]))) for scale, lateral, fpn
                  in zip(self.scales, self.lateral_convs, self.fpn_convs, strict=True)]
        while len(levels) < self.num_outs:
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return tuple(levels)
