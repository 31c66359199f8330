"""Key layouts: weights that other projects saved under other names, as the backbone at hand calls them."""
import math
import re
from collections.abc import Mapping
from functools import singledispatch
from typing import Any

from mmdet.models.backbones import PyramidVisionTransformer, ResNetV1d, SwinTransformer
from mmdet.models.backbones.pvt import pvt_convert
from mmdet.models.backbones.swin import WindowMSA, swin_converter
from torch import Tensor, nn
from torch.nn import functional as F

WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
"""Under which keys projects keep the tensors in their checkpoints, the better ones first, as timm does."""


def state_dict_of(checkpoint: Mapping[str, Any], prefix: str = '', wrapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, without DDP's ``module.`` and below ``prefix``.

    Args:
        checkpoint: what a checkpoint file holds, which may be an optimizer's state, arguments and so on besides.
        prefix: what the keys begin with that are wanted, such as ``'backbone'``; it is cut off.
        wrapped: look for the tensors wherever projects keep them, not only where MMEngine does.
    """
    for wrapper in WRAPPERS if wrapped else ('state_dict',):
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
            break
    prefix = prefix and prefix.rstrip('.') + '.'
    found = {}
    for key, value in checkpoint.items():
        key = re.sub(r'^module\.', '', key)
        if isinstance(value, Tensor) and key.startswith(prefix):
            found[key[len(prefix):]] = value
    return found


@singledispatch
def own_layout(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename (and reshape) the tensors of a foreign checkpoint for ``module``.

    Args:
        module: a backbone; only its class and its tensors' shapes are looked at. mmdet's own ResNets have
            torchvision's names, which for a plain ResNet are timm's as well.
        tensors: by key, in ``module``'s own layout or in one that is known for its class.

    Returns:
        Tensors by the module's keys. Keys in no known layout pass unchanged.
    """
    return dict(tensors)


@singledispatch
def never_pretrained(module: nn.Module) -> tuple[str, ...]:
    """Beginnings of keys that the checkpoints of classifiers never have for a ``module`` of this class."""
    return ()


def add_layout_hook(module: nn.Module) -> None:
    """From now on ``module`` loads state dicts in every layout that :func:`own_layout` knows for it.

    The hook goes before all others: those on replaced blocks look weights up under the module's own names.
    """
    module.register_load_state_dict_pre_hook(_translate_on_load)
    hooks = module._load_state_dict_pre_hooks
    hooks.move_to_end(next(reversed(hooks)), last=False)


@singledispatch
def translates(module: nn.Module) -> bool:
    """Whether ``module`` loads its weights through :func:`own_layout`; MMEngine's own way does not."""
    hooks = module._load_state_dict_pre_hooks.values()
    return any(getattr(wrapped, 'hook', None) is _translate_on_load for wrapped in hooks)


@translates.register(SwinTransformer)
@translates.register(PyramidVisionTransformer)
def _(module: nn.Module) -> bool:
    return module.convert_weights or translates.dispatch(nn.Module)(module)


def _translate_on_load(module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    own = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
    translated = own_layout(module, state_dict_of(own, wrapped=not prefix))
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]
    state_dict.update({prefix + key: value for key, value in translated.items()})


@own_layout.register
def _(module: SwinTransformer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Swin's original layout, and timm's, which has a stage's patch merging at the start of the next one."""
    own = {key.removeprefix('backbone.'): value for key, value in tensors.items()}
    if any(key.startswith('layers.') for key in own):
        if not any(key.startswith('layers.0.downsample') for key in own):
            if not translates.dispatch(nn.Module)(module):
                raise ValueError('mmdet\'s SwinTransformer doesn\'t read timm\'s layout; RLSwin does')
            own = {re.sub(r'^layers\.(\d+)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', key): value
                   for key, value in own.items()}
        own = {key.removeprefix('backbone.'): value for key, value in swin_converter(own).items()
               if not key.endswith('attn_mask')}
    for name, attention in module.named_modules():
        if isinstance(attention, WindowMSA):
            _fit_window_(own, name, attention.window_size)
    return own


def _fit_window_(tensors: dict[str, Tensor], name: str, window: tuple[int, int]) -> None:
    """Interpolate the position table of a window attention that was trained with another window size."""
    table, index = f'{name}.relative_position_bias_table', f'{name}.relative_position_index'
    if table in tensors:
        tensors[table] = resize_table(tensors[table], tuple(2 * size - 1 for size in window))
    if index in tensors and tensors[index].numel() != (window[0] * window[1]) ** 2:
        del tensors[index]  # places in the table of the other size; the module has its own


def resize_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate (bicubic) a square table of offsets, shape ``(h·w, heads)``, to ``size``."""
    if len(table) == size[0] * size[1]:
        return table
    side = math.isqrt(len(table))
    if side * side != len(table):
        raise ValueError(f'a relative-position table of {len(table)} rows is not square and can\'t be interpolated '
                         f'to {size[0]}x{size[1]}')
    square = table.T.reshape(1, -1, side, side)
    return F.interpolate(square.float(), size, mode='bicubic').to(table).reshape(-1, size[0] * size[1]).T.contiguous()


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolate (bicubic) absolute positions to ``grid``.

    Args:
        positions: shape ``(1, h, w, channels)``, or ``(1, n, channels)`` with up to two tokens before the patches of
            a square grid, which are dropped.
        grid: rows and columns of patches.

    Returns:
        Shape ``(1, rows, columns, channels)``.

    Raises:
        ValueError: the number of positions is that of no square grid.
    """
    if positions.ndim == 3:
        side = math.isqrt(positions.shape[1])
        if positions.shape[1] - side * side > 2:
            raise ValueError(f'position embeddings for {positions.shape[1]} tokens are for no square grid of patches '
                             f'and can\'t be interpolated to {grid[0]}x{grid[1]}')
        positions = positions[:, -side * side:].unflatten(1, (side, side))
    if positions.shape[1:3] == grid:
        return positions
    channels_first = positions.permute(0, 3, 1, 2).float()
    resized = F.interpolate(channels_first, grid, mode='bicubic', antialias=True)
    return resized.permute(0, 2, 3, 1).to(positions).contiguous()


def resize_offsets(table: Tensor, size: int) -> Tensor:
    """Interpolate (linear) the offsets of one axis, shape ``(2·side - 1, channels)``, to ``size`` of them."""
    if len(table) == size:
        return table
    return F.interpolate(table.T[None].float(), size, mode='linear')[0].T.to(table).contiguous()


@never_pretrained.register
def _(module: SwinTransformer) -> tuple[str, ...]:
    """The norms of the outputs; indices into the position tables, which timm doesn't save."""
    windows = [name for name, part in module.named_modules() if isinstance(part, WindowMSA)]
    return *(f'norm{index}.' for index in module.out_indices), *(f'{name}.relative_position_index' for name in windows)


@own_layout.register
def _(module: PyramidVisionTransformer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PVT's original layout, which mmdet's class reads where ``convert_weights`` is set."""
    return dict(pvt_convert(tensors) if module.convert_weights else tensors)


@own_layout.register
def _(module: ResNetV1d, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's layout of a ResNet with a deep stem (``resnet50d``): ``conv1.0 ... conv1.6`` and ``bn1``."""
    if 'conv1.0.weight' not in tensors:
        return dict(tensors)
    return {re.sub(r'^bn1\.', 'stem.7.', re.sub(r'^conv1\.(\d)\.', r'stem.\1.', key)): value
            for key, value in tensors.items()}
