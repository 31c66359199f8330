"""Reads weights that other projects saved under other names: renames them to the keys of the backbone at hand."""
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from functools import singledispatch
from typing import Any

from mmdet.models.backbones import PyramidVisionTransformer, ResNetV1d, SwinTransformer
from mmdet.models.backbones.pvt import pvt_convert
from mmdet.models.backbones.swin import WindowMSA, swin_converter
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model_state_dict', 'model', 'module')
"""The keys under which projects keep the tensors in their checkpoints. Averaged weights come first, as in timm."""


def plain_form(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint in MMEngine's form: its tensors by key, or under ``'state_dict'`` with other things beside them.

    Args:
        checkpoint: what a checkpoint file holds. Its tensors may be under any of :data:`WRAPPERS`, and their keys may
            have what DDP (``module.``) and ``torch.compile`` (``_orig_mod.``) put into them.
    """
    wrapper = next((key for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
    if wrapper is None:
        return _own_names(checkpoint)
    inner = plain_form(checkpoint[wrapper])
    return {**checkpoint, 'state_dict': inner.get('state_dict', inner)}


def _own_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by their own keys; what PyTorch notes on the modules that they come from stays with them."""
    if not any(key.startswith('module.') or '_orig_mod.' in key for key in map(str, tensors)):
        return tensors
    own = OrderedDict((_own_name(str(key)), value) for key, value in tensors.items())
    own._metadata = {_own_name(f'{key}.')[:-1]: value for key, value in getattr(tensors, '_metadata', {}).items()}
    return own


def _own_name(key: str) -> str:
    """The key without ``_orig_mod.``, and without ``module.`` at its beginning."""
    return re.sub(r'^(module\.)+', '', key.replace('_orig_mod.', ''))


def state_dict_of(checkpoint: Mapping[str, Any], prefix: str = '') -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, in whichever form it is (:func:`plain_form`).

    Args:
        checkpoint: what a checkpoint file holds. What is not a tensor is left out.
        prefix: take only the keys below it, such as ``'backbone'``, and cut it off.
    """
    tensors = plain_form(checkpoint)
    tensors = tensors.get('state_dict', tensors)
    prefix = prefix and prefix.rstrip('.') + '.'
    found = OrderedDict((str(key).removeprefix(prefix), value) for key, value in tensors.items()
                        if isinstance(value, Tensor) and str(key).startswith(prefix))
    if not prefix:
        found._metadata = getattr(tensors, '_metadata', OrderedDict())
    return found


def read_pretrained(init_cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the checkpoint that MMEngine's ``dict(type='Pretrained', checkpoint=..., prefix=...)`` names."""
    checkpoint = CheckpointLoader.load_checkpoint(init_cfg['checkpoint'], map_location='cpu')
    return state_dict_of(checkpoint, init_cfg.get('prefix') or '')


@singledispatch
def own_layout(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename (and reshape) the tensors of another project's checkpoint for ``module``.

    A layout is registered for a class of backbones. mmdet's ResNets need none: they have torchvision's names, which
    timm uses for plain ResNets, too.

    Args:
        module: a backbone; only its class and its tensors' shapes are looked at.
        tensors: by key, in the module's own layout or in one that is known for its class.

    Returns:
        Tensors by the module's keys. Keys of no known layout stay as they are.
    """
    return dict(tensors)


@singledispatch
def never_pretrained(module: nn.Module) -> tuple[str, ...]:
    """The first parts of keys that no classifier's checkpoint has for a ``module`` of this class."""
    return ()


def add_layout_hook(module: nn.Module) -> None:
    """Let ``module.load_state_dict`` take every layout that :func:`own_layout` knows for it.

    Call it before blocks are replaced: load hooks run in the order in which they were added, and the hook that
    replacement adds looks for weights under the module's own names.
    """
    module._register_load_state_dict_pre_hook(_translate_on_load, with_module=True)


@singledispatch
def translates(module: nn.Module) -> bool:
    """Whether ``module`` loads its weights through :func:`own_layout`."""
    return _has_layout_hook(module)


@translates.register(SwinTransformer)
@translates.register(PyramidVisionTransformer)
def _(module: nn.Module) -> bool:
    return module.convert_weights or _has_layout_hook(module)


def _has_layout_hook(module: nn.Module) -> bool:
    hooks = module._load_state_dict_pre_hooks.values()
    return any(getattr(wrapped, 'hook', None) is _translate_on_load for wrapped in hooks)


def _translate_on_load(module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """The load hook: replaces the tensors below ``prefix`` by the translated ones."""
    given = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    given = {key.removeprefix(prefix): value for key, value in given.items()}
    translated = own_layout(module, state_dict_of(given))
    state_dict.update({prefix + key: value for key, value in translated.items()})


@own_layout.register
def _(module: SwinTransformer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Swin's original layout, and timm's, where a stage's patch merging comes first in the next stage."""
    own = {key.removeprefix('backbone.'): value for key, value in tensors.items()}
    if any(key.startswith('layers.') for key in own):
        if not any(key.startswith('layers.0.downsample') for key in own):
            if not _has_layout_hook(module):
                raise ValueError('mmdet\'s SwinTransformer doesn\'t read timm\'s layout; RLSwin does')
            own = {re.sub(r'^layers\.(\d+)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', key): value
                   for key, value in own.items()}
        own = {key.removeprefix('backbone.'): value for key, value in swin_converter(own).items()
               if not key.endswith('attn_mask')}
    elif any(key.startswith('stages.') for key in own) and not _has_layout_hook(module):
        raise ValueError("mmdet's SwinTransformer doesn't read its own layout with convert_weights=True; set it to "
                         'False, or use RLSwin, which reads both')
    for name, attention in module.named_modules():
        if isinstance(attention, WindowMSA):
            _fit_window_(own, name, attention)
    return own


def _fit_window_(tensors: dict[str, Tensor], name: str, attention: WindowMSA) -> None:
    """Interpolate the position table of the attention ``name``, if it was trained with another window size.

    The interpolation is bicubic, as in mmdet's class and in Swin's own code.
    """
    table, index = f'{name}.relative_position_bias_table', f'{name}.relative_position_index'
    window = attention.window_size
    given, needed = len(tensors.get(table, ())), (2 * window[0] - 1) * (2 * window[1] - 1)
    if given not in (0, needed):
        from timm.layers import resize_rel_pos_bias_table_simple
        if math.isqrt(given) ** 2 != given:
            raise ValueError(f'{table} has {given} rows, which is no square, and can\'t be interpolated to {needed}')
        shape = (needed, attention.num_heads)
        tensors[table] = resize_rel_pos_bias_table_simple(tensors[table].float(), window, shape)
    if index in tensors and tensors[index].numel() != (window[0] * window[1]) ** 2:
        del tensors[index]  # for tables of the other size; the module has its own


@never_pretrained.register
def _(module: SwinTransformer) -> tuple[str, ...]:
    """The norms of the outputs, and the indices into position tables, which timm doesn't save."""
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
