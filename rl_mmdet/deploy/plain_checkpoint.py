"""A replaced detector's checkpoint as an ordinary baseline checkpoint."""
import os
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from mmdet.models.detectors import BaseDetector
from mmengine.config import Config
from torch import Tensor, nn

from ..engine import UserError, build_model, load_checkpoint_, read_checkpoint
from ..engine.detectors import inner_detectors
from ..engine.files import check_new_file, write_text, written_whole
from ..engine.reading import meta_of
from ..replacement import computing_layers, materialize
from ..replacement.operators import FullBlock
from .plain_config import plain_config


class Plain(NamedTuple):
    """What :func:`save_plain_checkpoint` has made.

    Args:
        blocks: the computing layers that are plain now.
        light: the light operators among them.
        config: the file with the config.
        needs: the types in that config for which it needs rl_mmdet.
    """
    blocks: list[str]
    light: list[str]
    config: str
    needs: list[str]

    def describe(self) -> str:
        """One line for the user: how many layers there are, and which config loads the checkpoint."""
        now = f'ordinary layers now ({", ".join(self.light)})' if self.light else 'plain blocks now'
        baseline = '' if self.light else "; the baseline's fits as well"
        needs = f'; it needs rl_mmdet for {", ".join(self.needs)}' if self.needs else ''
        return (f'{len(self.blocks)} computing layers are {now}; its config is in the file and in {self.config}'
                f'{needs}{baseline}')


SIDES = (64, 128, 224, 256, 384, 512)
"""Sides in pixels of the images that a materialized detector is checked on; the first that it accepts is used."""


def save_plain_checkpoint(cfg: Config, checkpoint: str, out: str, *, ignore_keys: Sequence[str] = (),
                          allow_pickle: bool = False) -> Plain:
    """Materialize a trained detector and save it as an ordinary checkpoint, with its config in ``meta`` and beside it.

    With ``FullBlock`` it is one for the baseline's config, too. With a light operator ordinary layers stand where the
    blocks were, and the config has ``fusion=dict(type='OwnWeights')`` in its ``replacement``.

    Args:
        cfg: the config the detector was trained with.
        checkpoint: its checkpoint.
        out: file to write, with the keys ``state_dict`` and ``meta``. Neither it nor the config, the same name with
            ``.py``, may exist.
        ignore_keys, allow_pickle: see :func:`~rl_mmdet.engine.load_checkpoint_`.

    Returns:
        What was made plain, and what the config needs.

    Raises:
        UserError: the checkpoint doesn't fit the config, isn't this model's own, or a file to be written exists.
    """
    config = f'{os.path.splitext(out)[0]}.py'
    if out == config:
        raise UserError(f'{out}: a config of that name is written beside the checkpoint; call this one *.pth')
    for file in (out, config):
        check_new_file(file)
    detector = plain_detector(cfg, checkpoint, ignore_keys=ignore_keys, allow_pickle=allow_pickle)
    if not detector.layers:
        raise UserError(f'{checkpoint}: it is an ordinary checkpoint already')
    classes = meta_of(read_checkpoint(checkpoint, allow_pickle)).get('dataset_meta')
    weights = detector.model.state_dict()
    text = detector.cfg.pretty_text
    with written_whole(out) as file:
        torch.save(dict(state_dict=weights, meta=dict(cfg=text) | ({'dataset_meta': classes} if classes else {})), file)
    write_text(config, text)
    light = {type(layer.operator).__name__ for layer in detector.layers.values()
             if not isinstance(layer.operator, FullBlock)}
    return Plain(list(detector.layers), sorted(light), config, detector.needs)


class PlainDetector(NamedTuple):
    """A trained detector without what Replacement Learning has added to it.

    Args:
        model: in eval mode.
        cfg: the config that builds it.
        needs: the types in that config for which it needs rl_mmdet.
        layers: the computing layers that it had; none if it was an ordinary one already.
    """
    model: nn.Module
    cfg: Config
    needs: list[str]
    layers: dict[str, nn.Module]


def plain_detector(cfg: Config, checkpoint: str, *, ignore_keys: Sequence[str] = (),
                   allow_pickle: bool = False) -> PlainDetector:
    """Build a trained detector, materialized, and check that it gives the same features.

    Args:
        cfg, checkpoint, ignore_keys, allow_pickle: see :func:`save_plain_checkpoint`; the detector may be an ordinary
            one, too.

    Raises:
        UserError: the checkpoint doesn't fit the config, or is a baseline's and the config a replaced one's.
    """
    model = build_model(cfg, allow_pickle).eval()
    report = load_checkpoint_(model, checkpoint, ignore=ignore_keys, allow_pickle=allow_pickle)
    if report.initialised:
        raise UserError(f'{checkpoint}: it is an ordinary checkpoint already; it goes with a config without '
                        'replacement')
    try:
        weights = materialize(model).state_dict()
    except ValueError as error:
        raise UserError(f'{checkpoint}: {error}') from error
    plain_cfg, needs = plain_config(cfg)
    plain = build_model(deepcopy(plain_cfg), allow_pickle).eval()
    plain.load_state_dict(weights)
    _check_same(model, plain)
    return PlainDetector(plain, plain_cfg, needs, computing_layers(model))


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
