"""A replaced detector's checkpoint as an ordinary baseline checkpoint."""
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmdet.models.detectors import BaseDetector
from mmengine.config import Config
from torch import Tensor, nn

from ..engine import UserError, build_model, load_checkpoint_, read_checkpoint
from ..engine.detectors import inner_detectors
from ..engine.files import check_new_file, written_whole
from ..replacement import computing_layers, materialize
from ..replacement.operators import FullBlock


class Plain(NamedTuple):
    """The computing layers that :func:`save_plain_checkpoint` made plain, and the light operators among them."""
    blocks: list[str]
    light: list[str]

    def describe(self) -> str:
        """One line for the user: how many layers there are, and which config loads the checkpoint."""
        if not self.light:
            return f'{len(self.blocks)} computing layers are plain blocks now; use it with the baseline\'s config'
        return (f'{len(self.blocks)} computing layers are ordinary layers now ({", ".join(self.light)}); use it with '
                "this config and fusion=dict(type='OwnWeights') in its replacement")


SIDES = (64, 128, 224, 256, 384, 512)
"""Sides in pixels of the images that a materialized detector is checked on; the first that it accepts is used."""


def save_plain_checkpoint(cfg: Config, checkpoint: str, out: str, *, ignore_keys: Sequence[str] = (),
                          allow_pickle: bool = False) -> Plain:
    """Materialize a trained detector and save it as an ordinary checkpoint.

    With ``FullBlock`` it is one for the baseline's config. With a light operator ordinary layers stand where the blocks
    were; the detector's own config loads it with ``fusion=dict(type='OwnWeights')`` in its ``replacement``.

    Args:
        cfg: the config the detector was trained with.
        checkpoint: its checkpoint.
        out: file to write, with the keys ``state_dict`` and ``meta``; must not exist.
        ignore_keys, allow_pickle: see :func:`~rl_mmdet.engine.load_checkpoint_`.

    Returns:
        The names of the computing layers that became plain, and of the light operators among them.

    Raises:
        UserError: the checkpoint doesn't fit the config, isn't this model's own, or ``out`` exists.
    """
    check_new_file(out)
    model = build_model(cfg, allow_pickle).eval()
    report = load_checkpoint_(model, checkpoint, ignore=ignore_keys, allow_pickle=allow_pickle)
    layers = computing_layers(model)
    if not layers or report.fits:
        raise UserError(f'{checkpoint}: it is an ordinary checkpoint already')
    try:
        plain = materialize(model)
    except ValueError as error:
        raise UserError(f'{checkpoint}: {error}') from error
    _check_same(model, plain)
    classes = read_checkpoint(checkpoint, allow_pickle).get('meta', {}).get('dataset_meta')
    with written_whole(out) as file:
        torch.save(dict(state_dict=plain.state_dict(), meta=dict(dataset_meta=classes)), file)
    light = {type(layer.operator).__name__ for layer in layers.values() if not isinstance(layer.operator, FullBlock)}
    return Plain(list(layers), sorted(light))


@torch.no_grad()
def _check_same(model: nn.Module, plain: nn.Module) -> None:
    """Raise AssertionError unless the detectors of both give the same features on a random image."""
    for name, detector in inner_detectors(model, computing_layers).items():
        image, features = _some_features(detector)
        torch.testing.assert_close(plain.get_submodule(name).extract_feat(image), features, rtol=1e-4, atol=1e-4)


def _some_features(detector: BaseDetector) -> tuple[Tensor, Any]:
    """A random image of a size that the detector accepts, and its features."""
    for side in SIDES:
        image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        try:
            return image, detector.extract_feat(image)
        except (RuntimeError, ValueError) as error:  # too small for an hourglass, not the one size that a model takes
            refusal = error
    raise UserError(f'none of the image sizes {SIDES} suits the model, so the result can\'t be checked: {refusal}')
