"""Delta files: what fine-tuning has changed in a base checkpoint."""
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..engine import UserError, read_checkpoint
from ..engine.files import check_new_file, written_whole
from ..engine.reading import check_names, meta_of
from ..engine.search import FOUND
from ..models.layouts import state_dict_of

FORMAT = 'rl_mmdet.delta/2'
KEPT = ('dataset_meta', FOUND)
"""What is kept of a checkpoint's ``meta``."""


@dataclass(frozen=True)
class DeltaInfo:
    """The contents of a delta file.

    Args:
        tensors: shape of every tensor in it, by key; they replace the base's or are new.
        removed: keys of the base that the fine-tuned checkpoint doesn't have.
        numbers: how many numbers the tensors have together.
        base_numbers: how many the base has.
        base_hash, result_hash: :func:`state_hash` of the base's tensors and of the fine-tuned ones.
        meta: what it keeps of the fine-tuned checkpoint's: ``dataset_meta``, the classes and the like, and ``found``,
            what a search has found.
        bytes: size of the file.
    """
    tensors: dict[str, tuple[int, ...]]
    removed: list[str]
    numbers: int
    base_numbers: int
    base_hash: str
    result_hash: str
    meta: dict[str, Any]
    bytes: int

    def __str__(self) -> str:
        parts: dict[str, int] = {}  # backbone, neck, heads
        for key, shape in self.tensors.items():
            part, dot, _ = key.partition('.')
            parts[part] = parts.get(part, 0) + torch.Size(shape).numel() * bool(dot)
        shares = ', '.join(f'{part} {numbers:,}' for part, numbers in parts.items() if numbers)
        lines = [f'{len(self.tensors)} tensors of {self.numbers:,} numbers{shares and f" ({shares})"}, '
                 f'{self.numbers / self.base_numbers:.1%} of '
                 f'the base\'s {self.base_numbers:,}; {self.bytes / 1e6:.1f} MB; base {self.base_hash[:16]}']
        lines += [f'  {key} {list(shape)}' for key, shape in self.tensors.items()]
        return '\n'.join(lines + [f'  {key} removed' for key in self.removed])


def state_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by key: of their keys, types, shapes and bits, in the order of the keys.

    It doesn't depend on what else a checkpoint file holds, such as an optimizer's state.
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f'{key}\0{tensor.dtype}\0{list(tensor.shape)}\0'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b'')
    return digest.hexdigest()


def save_delta(base: str, tuned: str, out: str, allow_pickle: bool = False) -> DeltaInfo:
    """Write what a fine-tuned checkpoint has changed in its base: the new values of the tensors that differ in any bit.

    Args:
        base: checkpoint that the fine-tuning started from.
        tuned: checkpoint at its end.
        out: file to write, ``.safetensors``; must not exist.
        allow_pickle: see :func:`~rl_mmdet.engine.read_checkpoint`.

    Raises:
        UserError: a file can't be read, the two have nothing in common, or ``out`` is in the way or has another ending.
    """
    if not out.endswith('.safetensors'):
        raise UserError(f'{out}: a delta file is called *.safetensors')
    check_new_file(out)
    before, _ = _read(base, allow_pickle)
    after, meta = _read(tuned, allow_pickle)
    if not any(key in before and _same(tensor, before[key]) for key, tensor in after.items()):
        raise UserError(f'{tuned}: no tensor is the same as in {base}: it doesn\'t come from this base, or all was '
                        'trained; then a delta saves nothing')
    changed = {key: tensor.contiguous() for key, tensor in after.items()
               if key not in before or not _same(tensor, before[key])}
    metadata = dict(format=FORMAT, base=state_hash(before), result=state_hash(after),
                    base_numbers=str(sum(tensor.numel() for tensor in before.values())),
                    removed=json.dumps(sorted(set(before) - set(after))), meta=_as_json(tuned, meta))
    with written_whole(out) as file:
        save_file({key: tensor.clone() for key, tensor in changed.items()}, file, metadata)
    return delta_info(out)


def apply_delta(base: str, delta: str, out: str, allow_pickle: bool = False) -> DeltaInfo:
    """Write the checkpoint that a delta file was made from, an ordinary one.

    Args:
        base: the checkpoint that the delta belongs to.
        delta: file by :func:`save_delta`.
        out: file to write, with the keys ``state_dict`` and ``meta``; must not exist.
        allow_pickle: see :func:`~rl_mmdet.engine.read_checkpoint`.

    Raises:
        UserError: another base, a file that can't be read, or ``out`` exists.
    """
    check_new_file(out)
    info = delta_info(delta)
    tensors, _ = _read(base, allow_pickle)
    if state_hash(tensors) != info.base_hash:
        raise UserError(f'{base}: not the base of this delta: its tensors\' hash is {state_hash(tensors)[:16]}, the '
                        f'delta was made from {info.base_hash[:16]}')
    with _opened(delta) as file:
        tensors = {key: tensor for key, tensor in tensors.items() if key not in info.removed}
        tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if state_hash(tensors) != info.result_hash:
        raise UserError(f'{delta}: it is damaged: applied to its base it doesn\'t give what it was made from')
    with written_whole(out) as file:
        torch.save(dict(state_dict=tensors, meta=info.meta), file)
    return info


def delta_info(delta: str) -> DeltaInfo:
    """What is in a delta file.

    Raises:
        UserError: it is no delta file, or damaged.
    """
    with _opened(delta) as file:
        metadata = file.metadata() or {}
        if metadata.get('format') != FORMAT:
            raise UserError(f'{delta}: not a delta file of this version ({FORMAT})')
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    try:
        removed, meta = json.loads(metadata['removed']), json.loads(metadata['meta'])
        info = DeltaInfo(shapes, removed, numbers, int(metadata['base_numbers']), metadata['base'], metadata['result'],
                         meta, os.path.getsize(delta))
        if not (isinstance(removed, list) and isinstance(meta, dict) and info.base_numbers > 0
                and all(key in KEPT and isinstance(value, dict) for key, value in meta.items())
                and all(re.fullmatch('[0-9a-f]{64}', each) for each in (info.base_hash, info.result_hash))):
            raise ValueError
    except (KeyError, ValueError, RecursionError):
        raise UserError(f'{delta}: it is damaged: its metadata aren\'t those of a delta file') from None
    check_names(delta, [*shapes, *removed])
    return info


def _read(path: str, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors, and what a delta keeps of its ``meta``."""
    checkpoint = read_checkpoint(path, allow_pickle)
    tensors = state_dict_of(checkpoint)
    if not tensors:
        raise UserError(f'{path}: holds no tensor')
    meta = meta_of(checkpoint)
    return tensors, {key: meta[key] for key in KEPT if meta.get(key) is not None}


def _as_json(path: str, meta: dict[str, Any]) -> str:
    """Text of a checkpoint's ``meta``, with lists for arrays and sets."""
    def listed(value: Any) -> list:
        return value.tolist() if hasattr(value, 'tolist') else sorted(value)
    try:
        return json.dumps(meta, default=listed)
    except TypeError as error:
        raise UserError(f'{path}: a delta can\'t keep its meta ({error}); take out what is no number, text, list or '
                        'dict') from None


def _opened(path: str) -> Any:
    """The open safetensors file."""
    try:
        return safe_open(path, 'pt')
    except FileNotFoundError:
        raise UserError(f'{path}: there is no such file') from None
    except (SafetensorError, OSError) as error:
        raise UserError(f'{path}: truncated, or not a safetensors file ({error})') from None


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal in type, shape and every bit."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
