"""Plain vision transformers for detection (ViTDet) with Replacement Learning."""
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from ..layouts import never_pretrained, own_layout
from ..timm_models import timm_layout
from .timm_backbone import TimmBackbone

VITDET = 'samvit_base_patch16'
"""timm's image encoder of SAM, which has ViTDet's body."""
ARCHS = {
    'tiny': dict(embed_dim=192, depth=12, num_heads=3),
    'small': dict(embed_dim=384, depth=12, num_heads=6),
    'base': dict(embed_dim=768, depth=12, num_heads=12),
    'large': dict(embed_dim=1024, depth=24, num_heads=16),
    'huge': dict(embed_dim=1280, depth=32, num_heads=16),
}


@MODELS.register_module()
class RLViT(TimmBackbone):
    """ViTDet's plain vision transformer as a detector's backbone.

    It has windowed attention with some global blocks and relative positions, and takes images of any size. Weights may
    be SAM's or a plain ViT's (MAE, DeiT, timm's); positions of another grid are interpolated. A replaced block keeps
    its own kind of attention, and its position tables come from the nearest kept blocks of that kind.

    Its feature map has the stride of a patch; :class:`~rl_mmdet.models.SimpleFPN` makes a pyramid of it.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'`` (default), ``'large'``, ``'huge'``, or a dict with ``embed_dim``,
            ``depth`` and ``num_heads``.
        **kwargs: the arguments of :class:`~rl_mmdet.models.backbones.timm_backbone.TimmBackbone`, ``replacement``
            among them. Also: ``img_size`` (1024), the side in pixels of the images that the global
            blocks' position tables are made for; ``patch_size`` (16), in pixels; ``window_size`` (14), in patches;
            ``global_attn_indexes``, the blocks that attend to the whole image, by default the last of each quarter;
            ``use_rel_pos`` (True), relative positions in every block.

    Raises:
        ValueError: an unknown ``arch``, a block that doesn't exist, or what TimmBackbone refuses.

    Example:
        >>> RLViT('base', replacement=dict(plan=dict(type='EveryKth', k=2)))

    Source: "Exploring Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527.
    """

    def __init__(self, arch: str | Mapping[str, int] = 'base', **kwargs: Any) -> None:
        if 'timm' in kwargs:
            raise ValueError("RLViT is ViTDet's; for a model of timm use dict(type='RLBackbone', "
                             f'timm={kwargs["timm"]!r})')
        super().__init__(VITDET, **_vitdet_arguments(arch, **kwargs))


def _vitdet_arguments(arch: str | Mapping[str, int], *, img_size: int = 1024, patch_size: int = 16,
                      window_size: int = 14, global_attn_indexes: Sequence[int] | None = None,
                      use_rel_pos: bool = True, **kwargs: Any) -> dict[str, Any]:
    """The arguments of timm's model for the ViTDet that :class:`RLViT` is asked for."""
    if isinstance(arch, Mapping):
        if set(arch) != {'embed_dim', 'depth', 'num_heads'}:
            raise ValueError(f'arch must have embed_dim, depth and num_heads, got {dict(arch)}')
    elif arch not in ARCHS:
        raise ValueError(f'unknown arch {arch!r}; allowed: {", ".join(ARCHS)}, or a dict with embed_dim, depth and '
                         'num_heads')
    sizes = arch if isinstance(arch, Mapping) else ARCHS[arch]
    depth = sizes['depth']
    if global_attn_indexes is None:
        global_attn_indexes = sorted({max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)})
    wrong = [index for index in global_attn_indexes if not 0 <= index < depth]
    if wrong:
        raise ValueError(f'global_attn_indexes {list(global_attn_indexes)} has {wrong[0]}, but the blocks are 0 to '
                         f'{depth - 1}')
    if img_size % patch_size:
        raise ValueError(f'img_size={img_size} is no multiple of patch_size={patch_size}')
    return dict(img_size=img_size, patch_size=patch_size, window_size=window_size, use_rel_pos=use_rel_pos,
                global_attn_indexes=tuple(global_attn_indexes), neck_chans=0, **sizes, **kwargs)


@own_layout.register
def _(module: RLViT, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SAM's and plain ViTs' layouts for ViTDet: the body's tensors, with positions for its grid and windows."""
    own = {key: value for key, value in timm_layout(VITDET, module.body, tensors).items()
           if key.startswith(('patch_embed.', 'blocks.', 'pos_embed'))}
    grid = module.kwargs['img_size'] // module.kwargs['patch_size']
    for key, value in own.items():
        if key == 'pos_embed':
            own[key] = _resize_positions(value, grid)
        elif key.endswith(('rel_pos_h', 'rel_pos_w')):
            is_global = int(key.split('.')[1]) in module.kwargs['global_attn_indexes']
            side = grid if is_global else module.kwargs['window_size']
            own[key] = F.interpolate(value.float().T[None], 2 * side - 1, mode='linear')[0].T
    return own


def _resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings ``(1, grid, grid, channels)``, interpolated from ``positions``.

    These are ``(1, h, w, channels)``, or ``(1, n, channels)`` for a square grid of patches after up to two tokens.
    """
    from timm.layers import resample_abs_pos_embed_nhwc
    if positions.ndim == 3:
        side = math.isqrt(positions.shape[1])
        if positions.shape[1] - side * side > 2:
            raise ValueError(f'position embeddings for {positions.shape[1]} tokens are for no square grid of patches '
                             f'and can\'t be interpolated to {grid}x{grid}')
        positions = positions[:, -side * side:].unflatten(1, (side, side))
    return resample_abs_pos_embed_nhwc(positions, (grid, grid))


@never_pretrained.register
def _(module: RLViT) -> tuple[str, ...]:
    """Plain ViTs have no relative positions, which ViTDet has."""
    return tuple(f'blocks.{index}.attn.rel_pos' for index in range(len(module.blocks)))
