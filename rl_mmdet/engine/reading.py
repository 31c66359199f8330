"""The one way in which files with weights are read: without running their code, unless the user allows it."""
import os
import os.path as osp
import pickle
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.runner import CheckpointLoader
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..models.layouts import plain_form
from .errors import UserError, first_line
from .weights_only import load_weights_only

_torch_load, _fetch_file = torch.load, CheckpointLoader.load_checkpoint


def meta_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint says of its training; empty where it says nothing, or has something else there."""
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, Mapping) else {}


def read_checkpoint(path: str, allow_pickle: bool = False, map_location: Any = 'cpu') -> dict[str, Any]:
    """Read a checkpoint as tensors and plain data, without unpickling code.

    Args:
        path: a local file, or anything MMEngine can fetch (``https://``, ``torchvision://``, ``open-mmlab://``).
        allow_pickle: also read files that need code to be unpickled; only for files you trust.
        map_location: as for :func:`torch.load`.

    Returns:
        What the file holds. However it was saved, its tensors are in it by key, or under ``'state_dict'``
        (:func:`~rl_mmdet.models.layouts.plain_form`).

    Raises:
        UserError: no such file, truncated, foreign, needs unpickling code, or can't be fetched.
    """
    path = os.fspath(path)
    with safe_reading(allow_pickle):
        checkpoint = _fetch(path, map_location) if '://' in path else _read_file(path, allow_pickle, map_location)
    if not isinstance(checkpoint, Mapping):
        raise UserError(f'{path}: holds a {type(checkpoint).__name__}, not a state dict')
    checkpoint = plain_form(checkpoint)
    tensors = checkpoint.get('state_dict', checkpoint)
    check_names(path, tensors if isinstance(tensors, Mapping) else ())
    return checkpoint


@contextmanager
def safe_reading(allow_pickle: bool = False) -> Iterator[None]:
    """While it lasts, MMEngine reads checkpoints by :func:`read_checkpoint`, and no file that is read runs code.

    That holds for all code in this process: a detector that loads its teacher, a hook, timm, ``torch.hub``.

    Args:
        allow_pickle: let ``torch.load`` run code all the same.
    """
    before = torch.load, CheckpointLoader.__dict__['load_checkpoint']

    def load_checkpoint(filename: str, map_location: Any = None, logger: Any = None) -> dict[str, Any]:
        return read_checkpoint(filename, allow_pickle, map_location)

    def load(file: Any, map_location: Any = None, pickle_module: Any = None, *, weights_only: bool | None = None,
             **settings: Any) -> Any:
        return _read(file, _name_of(file), allow_pickle, map_location=map_location, **settings)

    torch.load, CheckpointLoader.load_checkpoint = load, staticmethod(load_checkpoint)
    try:
        yield
    finally:
        torch.load, CheckpointLoader.load_checkpoint = before


def check_names(path: str, names: Any) -> None:
    """Raise a UserError if a tensor's name would do something to the terminal that it is printed on."""
    for name in names:
        if not str(name).isprintable():
            raise UserError(f'{path}: a tensor in it is called {str(name)[:80]!r}; names of tensors have no control '
                            'characters, so it isn\'t a checkpoint')


def _name_of(file: Any) -> str:
    """What an open file, or a path, is called in messages."""
    return str(getattr(file, 'name', 'checkpoint')) if hasattr(file, 'read') else osp.expanduser(os.fspath(file))


def _read_file(path: str, allow_pickle: bool, map_location: Any) -> Any:
    """The contents of a local file."""
    path = osp.expanduser(path)
    if osp.isdir(path):
        raise UserError(f'{path}: it is a folder; name a checkpoint file in it')
    if not osp.isfile(path):
        raise UserError(f'{path}: there is no such checkpoint file')
    return _read(path, path, allow_pickle, map_location=map_location)


def _read(file: Any, name: str, allow_pickle: bool, **settings: Any) -> Any:
    """What is in a file, given as a path or open."""
    if isinstance(file, (str, os.PathLike)) and osp.isfile(file):
        kind = _kind(file)
        if kind == 'safetensors':
            return _read_safetensors(os.fspath(file))
        if kind:
            raise UserError(f'{name}: {kind}')
    try:
        return load_weights_only(file, **settings)
    except pickle.UnpicklingError as error:
        needs_code = re.search(r'(?:GLOBAL|Unsupported class) (\S+)|(unrecognized|Can only)', str(error))
        if needs_code and allow_pickle:
            if hasattr(file, 'seek'):
                file.seek(0)
            return _torch_load(file, weights_only=False, **settings)
        if needs_code:
            code = f' ({needs_code[1]})' if needs_code[1] else ''
            raise UserError(f'{name}: reading it would run code{code}; if you trust where it comes from, add '
                            '--allow-pickle') from None
        raise UserError(f'{name}: not a PyTorch checkpoint, or a truncated one') from None
    except (EOFError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(f'{name}: truncated, or not a PyTorch checkpoint ({first_line(error)[:120]})') from None


def _kind(path: str | os.PathLike) -> str:
    """``'safetensors'``, or what a file is that certainly isn't a checkpoint; empty where it may be one."""
    with open(path, 'rb') as file:
        head = file.read(512)
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if not head:
        return 'it is empty, so not a PyTorch checkpoint'
    if text.startswith(b'version https://git-lfs'):
        return 'it is a pointer of Git LFS, not the file itself; get that with "git lfs pull"'
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head')):
        return 'it is a web page, not a PyTorch checkpoint: the link that it was downloaded from shows a page'
    if os.fspath(path).endswith('.safetensors') or head[8:10] == b'{"':
        return 'safetensors'
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition('/')[2] for name in archive.namelist()}
        if 'constants.pkl' in names:
            return 'it is a TorchScript program, not a checkpoint; save the state_dict() of the model in it'
        if 'data.pkl' not in names:
            return f'it is a zip archive of {len(names)} files, not a PyTorch checkpoint; unpack it'
    elif tarfile.is_tarfile(path) or head.startswith(b'\x1f\x8b'):
        return 'it is a tar or gzip archive, not a PyTorch checkpoint; unpack it'
    return ''


def _read_safetensors(path: str) -> dict[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f'{path}: truncated, or not a safetensors file ({error})') from None


def _fetch(path: str, map_location: Any) -> dict[str, Any]:
    """What MMEngine finds under a URL, or another name that it knows."""
    try:
        return _fetch_file(path, map_location=map_location, logger='silent')
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except FileNotFoundError as error:  # timm://, which says where it has looked
        raise UserError(str(error)) from None
    except Exception as error:  # network, DNS, HTTP and hub errors come in every class
        raise UserError(f'{path}: can\'t be fetched ({type(error).__name__}: {error}); download the file where there '
                        'is a network and name it instead, e.g. --cfg-options '
                        'model.backbone.init_cfg.checkpoint=FILE, or train from scratch with '
                        'model.backbone.init_cfg=None') from None
