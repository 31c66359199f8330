"""Plain vision transformers for detection (ViTDet) with Replacement Learning."""
from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.registry import MODELS
from torch import Tensor

from ..layouts import never_pretrained, own_layout, resize_offsets, resize_positions
from ..timm_models import timm_layout
from .replacement_mixin import ReplacementMixin
from .timm_backbone import TimmBackbone

BODY = 'samvit_base_patch16'
"""timm's image encoder of SAM has ViTDet's body."""
ARCHS = {
    'tiny': dict(embed_dim=192, depth=12, num_heads=3),
    'small': dict(embed_dim=384, depth=12, num_heads=6),
    'base': dict(embed_dim=768, depth=12, num_heads=12),
    'large': dict(embed_dim=1024, depth=24, num_heads=16),
    'huge': dict(embed_dim=1280, depth=32, num_heads=16),
}


class ViTDet(TimmBackbone):
    """ViTDet's backbone: windowed attention with some global blocks, relative positions, any image size.

    Its one feature map has the stride of a patch; :class:`~rl_mmdet.models.SimpleFPN` makes a pyramid of it.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, ``'huge'``, or a dict with ``embed_dim``, ``depth``
            and ``num_heads``.
        img_size: side in pixels of the images that the global blocks' position tables are made for; for other
            sizes they are interpolated.
        patch_size: side of a patch in pixels.
        window_size: side of a window in patches.
        global_attn_indexes: blocks that attend to the whole image; by default the last of each quarter.
        use_rel_pos: learn relative positions in every block.
        drop_path_rate: stochastic depth at the last block.
        **kwargs: other arguments of :class:`~rl_mmdet.models.backbones.timm_backbone.TimmBackbone`.

    Weights may be SAM's or a plain ViT's (MAE, DeiT, timm's): positions of another grid are interpolated.

    Raises:
        ValueError: unknown ``arch``, a block that doesn't exist, or what TimmBackbone refuses.

    Source: "Exploring Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527.
    """

    def __init__(self, arch: str | Mapping[str, int] = 'base', *, img_size: int = 1024, patch_size: int = 16,
                 window_size: int = 14, global_attn_indexes: Sequence[int] | None = None, use_rel_pos: bool = True,
                 drop_path_rate: float = 0., **kwargs: Any) -> None:
        sizes = _sizes(arch)
        depth = sizes['depth']
        if global_attn_indexes is None:
            global_attn_indexes = sorted({max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)})
        wrong = [index for index in global_attn_indexes if not 0 <= index < depth]
        if wrong:
            raise ValueError(f'global_attn_indexes {list(global_attn_indexes)} has {wrong[0]}, but the blocks are 0 to '
                             f'{depth - 1}')
        if img_size % patch_size:
            raise ValueError(f'img_size={img_size} is no multiple of patch_size={patch_size}')
        super().__init__(BODY, img_size=img_size, patch_size=patch_size, window_size=window_size,
                         global_attn_indexes=tuple(global_attn_indexes), use_rel_pos=use_rel_pos,
                         drop_path_rate=drop_path_rate, neck_chans=0, **sizes, **kwargs)


class RLViTDet(ReplacementMixin, ViTDet):
    """:class:`ViTDet` with Replacement Learning; configs name it ``dict(type='RLViT', arch=...)``.

    A replaced block keeps its own kind of attention, windowed or global; its position tables come from the nearest
    kept blocks of that kind.
    """


class RLPlainViT(ReplacementMixin, TimmBackbone):
    """A plain ViT of timm with Replacement Learning; configs name it ``dict(type='RLViT', timm=...)``."""

    def __init__(self, timm: str, **kwargs: Any) -> None:
        super().__init__(timm, **kwargs)
        if self.patch == 1:
            raise ValueError(f"RLViT: timm's {timm} is no plain ViT, its maps have several strides; use "
                             f"dict(type='RLBackbone', timm={timm!r})")


@MODELS.register_module()
def RLViT(arch: str | Mapping[str, int] | None = None, *, timm: str | None = None,  # noqa: N802
          **kwargs: Any) -> TimmBackbone:
    """Build a plain vision transformer as a detector's backbone, with blocks replaced.

    Args:
        arch: :class:`ViTDet`'s size, ``'base'`` by default, to train with windowed attention.
        timm: instead of ``arch``, the name of a plain ViT of timm (ViT, DeiT, DINOv2, DINOv3, EVA): attention is
            global in every block, and position embeddings are interpolated to the image.
        **kwargs: the arguments of :class:`ViTDet` or
            :class:`~rl_mmdet.models.backbones.timm_backbone.TimmBackbone`, and ``replacement``.

    Raises:
        ValueError: both ``arch`` and ``timm``, a model that is no plain ViT, or what these classes refuse.

    Example:
        >>> RLViT('base', replacement=dict(plan=dict(type='EveryKth', k=2)))
        >>> RLViT(timm='vit_base_patch14_dinov2', norm=True)
    """
    if timm is None:
        return RLViTDet('base' if arch is None else arch, **kwargs)
    if arch is not None:
        raise ValueError(f'RLViT: arch={arch!r} and timm={timm!r} both say which model; leave one out')
    return RLPlainViT(timm, **kwargs)


def _sizes(arch: str | Mapping[str, int]) -> dict[str, int]:
    if isinstance(arch, Mapping):
        if set(arch) != {'embed_dim', 'depth', 'num_heads'}:
            raise ValueError(f'arch must have embed_dim, depth and num_heads, got {dict(arch)}')
        return dict(arch)
    if arch not in ARCHS:
        raise ValueError(f'unknown arch {arch!r}; allowed: {", ".join(ARCHS)}, or a dict with embed_dim, depth and '
                         'num_heads')
    return dict(ARCHS[arch])


@own_layout.register
def _(module: ViTDet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SAM's and plain ViTs' layouts; only the body's tensors, with positions for the grid at hand."""
    own = {key: value for key, value in timm_layout(BODY, module.body, tensors).items()
           if key.startswith(('patch_embed.', 'blocks.')) or key == 'pos_embed'}
    grid = module.kwargs['img_size'] // module.kwargs['patch_size']
    if 'pos_embed' in own:
        own['pos_embed'] = resize_positions(own['pos_embed'], (grid, grid))
    for key, value in own.items():
        if key.endswith(('rel_pos_h', 'rel_pos_w')):
            index = int(key.split('.')[1])
            side = grid if index in module.kwargs['global_attn_indexes'] else module.kwargs['window_size']
            own[key] = resize_offsets(value, 2 * side - 1)
    return own


@never_pretrained.register
def _(module: ViTDet) -> tuple[str, ...]:
    """Plain ViTs have no relative positions."""
    return tuple(f'blocks.{index}.attn.rel_pos' for index in range(module.kwargs['depth']))
