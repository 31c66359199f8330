"""timm's models: built by name, and their weights read. timm is imported on first use, as that takes a second."""
import difflib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SCHEME = 'timm://'


def norms_with_more(model: nn.Module) -> list[str]:
    """Names of the BatchNorms with more inside, as timm's with an activation, which converting or fusing drops."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)
            and any(not isinstance(child, nn.Identity) for child in module.children())]


def build_timm_model(name: str, **kwargs: Any) -> nn.Module:
    """Build a timm model without its classifier and, where the model can, for images of any size.

    Args:
        name: timm's name of the model, with or without a tag (``resnet50.a1_in1k``).
        **kwargs: whatever ``timm.create_model`` takes for it.

    Raises:
        ValueError: timm has no such model (the nearest names are suggested), or the model refuses an argument.
    """
    import timm
    if not timm.is_model(name):
        known = difflib.get_close_matches(name.partition('.')[0], timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f'timm has no model {name!r}' + (f'; did you mean {", ".join(known)}?' if known else
                                                          "; timm.list_models('*NAME*') searches"))
    if 'features_only' in kwargs:
        raise ValueError(f'timm model {name}: leave features_only out, RLBackbone gives feature maps anyway; '
                         'out_indices says which')
    kwargs = dict(num_classes=0) | kwargs
    try:
        try:
            return timm.create_model(name, **dict(dynamic_img_size=True) | kwargs)
        except TypeError as error:  # the model takes images of any size anyway, or of one size only
            if 'dynamic_img_size' not in str(error) or 'dynamic_img_size' in kwargs:
                raise
        return timm.create_model(name, **kwargs)
    except (TypeError, AssertionError, RuntimeError) as error:
        hint = ' (inherited from a base config? then set _delete_=True)' if 'keyword argument' in str(error) else ''
        raise ValueError(f'timm model {name}: {error}{hint}') from error


def read_timm_weights(source: str) -> dict[str, Tensor]:
    """Read weights for a timm model or in a file format that timm reads, without unpickling code.

    Args:
        source: a file (``.safetensors`` or PyTorch's), or a model's name with its tag. Files come first:
            ``<torch hub folder>/checkpoints/<name>.safetensors`` (or ``.pth``), then timm's cache, then its download.

    Raises:
        FileNotFoundError: neither the file nor a network is there; the message says which file to put where.
    """
    from timm.models import load_state_dict
    files = [Path(source).expanduser(), *(_weights_folder() / f'{source}{end}' for end in ('.safetensors', '.pth'))]
    for file in files:
        if file.is_file():
            return load_state_dict(str(file), weights_only=True)
    if os.sep in source or source.endswith(('.safetensors', '.pth', '.bin')):
        raise FileNotFoundError(f'{source}: there is no such checkpoint file')
    return _download(source)


def _weights_folder() -> Path:
    """Where a user may put files that can't be downloaded."""
    return Path(torch.hub.get_dir()) / 'checkpoints'


def _download(name: str) -> dict[str, Tensor]:
    """The weights ``name`` from timm's cache or its download."""
    import timm
    from timm.models import load_state_dict_from_hf
    if not timm.is_model_pretrained(name):
        known = timm.list_pretrained(f'{name.partition(".")[0]}*')[:5]
        raise FileNotFoundError(f'timm has no weights {name!r}' + (f'; it has {", ".join(known)}' if known else ''))
    cfg = timm.get_pretrained_cfg(name)
    try:
        if cfg.hf_hub_id:
            return load_state_dict_from_hf(cfg.hf_hub_id, cfg.hf_hub_filename or 'pytorch_model.bin', weights_only=True)
        return torch.hub.load_state_dict_from_url(cfg.url, map_location='cpu', weights_only=True)
    except Exception as error:  # network, DNS, HTTP and hub errors have no common class
        where = f'model.safetensors of {cfg.hf_hub_id}' if cfg.hf_hub_id else Path(cfg.url).name
        raise FileNotFoundError(
            f'the weights {name} are not on this machine and can\'t be fetched ({type(error).__name__}); download '
            f'{where} where there is a network and put it at {_weights_folder() / name}.safetensors, or name the file: '
            "init_cfg=dict(type='Pretrained', checkpoint=FILE)") from None


def untouched(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The timm model on the meta device, to look at its keys and shapes: it takes no memory and no time."""
    try:
        with torch.device('meta'):
            return build_timm_model(name, **kwargs)
    except ValueError:  # before 1.0.21 some read values while they are built
        return build_timm_model(name, **kwargs)


def timm_layout(name: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let timm translate a checkpoint for one of its models: the original project's keys, position embeddings.

    Args:
        name: of the model.
        model: the model, or an :func:`untouched` one.
        tensors: by key, in a layout that timm knows.

    Raises:
        ValueError: timm can't read them, for instance position embeddings of no known grid.
    """
    import timm
    module = sys.modules[timm.model_entrypoint(name.partition('.')[0]).__module__]
    translate = getattr(module, 'checkpoint_filter_fn', None)
    if translate is None:
        return dict(tensors)
    try:
        return {key: value for key, value in translate(dict(tensors), model).items() if isinstance(value, Tensor)}
    except (RuntimeError, KeyError, AssertionError, ValueError, TypeError) as error:
        positions = tensors.get('pos_embed')
        about = '' if positions is None else f' with position embeddings of shape {tuple(positions.shape)}'
        text = re.sub(r'\s+', ' ', str(error))
        raise ValueError(f'timm can\'t read weights{about} as {name}\'s: {text[:200]}') from error


@CheckpointLoader.register_scheme(prefixes=[SCHEME, r'[^:]*\.safetensors$'])
def _load(path: str, map_location: Any = 'cpu') -> dict[str, Tensor]:
    """What MMEngine calls for ``timm://NAME``, ``timm://FILE`` and ``FILE.safetensors`` in any model's ``init_cfg``."""
    return read_timm_weights(path.removeprefix(SCHEME))
