"""A replaced detector's checkpoint as an ordinary baseline checkpoint."""
import os
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from ..engine import UserError, build_model, check_checkpoint, read_checkpoint
from ..models.layouts import state_dict_of
from ..replacement import computing_layers, materialize


def save_plain_checkpoint(cfg: Config, checkpoint: str, out: str, allow_pickle: bool = False) -> int:
    """Materialize a trained detector and save it as a checkpoint that the baseline's config loads.

    Args:
        cfg: the config the detector was trained with.
        checkpoint: its checkpoint.
        out: file to write, with the keys ``state_dict`` and ``meta``; must not exist.
        allow_pickle: see :func:`~rl_mmdet.engine.read_checkpoint`.

    Returns:
        Number of computing layers that became plain blocks.

    Raises:
        UserError: the checkpoint doesn't fit the config, isn't this model's own, or ``out`` exists.
    """
    if os.path.lexists(out):
        raise UserError(f'{out}: exists already; name another file')
    model = build_model(cfg).eval()
    report = check_checkpoint(model, checkpoint, allow_pickle=allow_pickle)
    layers = computing_layers(model)
    if not layers or report.fits:
        raise UserError(f'{checkpoint}: it is an ordinary checkpoint already')
    loaded = read_checkpoint(checkpoint, allow_pickle)
    model.load_state_dict(state_dict_of(loaded), strict=False)
    try:
        plain = materialize(model)
    except ValueError as error:
        raise UserError(f'{checkpoint}: {error}') from error
    _check_same(model, plain)
    part = Path(f'{out}.part')
    classes = loaded.get('meta', {}).get('dataset_meta')
    torch.save(dict(state_dict=plain.state_dict(), meta=dict(dataset_meta=classes)), part)
    os.replace(part, out)
    return len(layers)


@torch.no_grad()
def _check_same(model: nn.Module, plain: nn.Module) -> None:
    """Both give the same features on a random image."""
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(model.extract_feat(image), plain.extract_feat(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
