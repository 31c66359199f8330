"""Trials: what a replacement would give, found out on a copy that has the model's own weights."""
from collections.abc import Sequence

import torch
from torch import nn

from ..block_structure import copy_around_parameters
from ..chain import Choice
from ..computing_layer import LayerSettings
from ..flops import count_flops
from ..surgery import replace_blocks_
from .blocks import Blocks


def replaced_twin(model: nn.Module, choice: Choice, settings: LayerSettings | None) -> nn.Module:
    """A copy of ``model``, in eval mode, with the blocks of ``choice`` replaced, which may be none.

    Its parameters *are* the model's, so it takes next to no memory; they must not be written to. Modes and buffers are
    its own.

    Args:
        model: stays as it is.
        choice: block indices by chain name.
        settings: fusion, operator, gradient and start; None for the defaults.
    """
    twin = copy_around_parameters(model)
    if any(choice.values()):
        given = settings._asdict() if settings else {}
        if settings and settings.start.keeps_block:  # nobody will fit this one
            given['start'] = None
        replace_blocks_(twin, dict(given, plan=Blocks(choice)))
    twin.eval()  # mmdet's backbones return None here
    return twin


@torch.no_grad()
def forward_flops(model: nn.Module, image_size: Sequence[int]) -> int:
    """FLOPs of one forward run on 1×3×image_size, by :func:`~rl_mmdet.replacement.flops.count_flops`.

    Args:
        model: in the mode to count it in.
        image_size: height and width, in pixels.

    Raises:
        ValueError: the model can't run on such an image.
    """
    like = next(model.parameters())
    image = torch.zeros(1, 3, *image_size, device=like.device, dtype=like.dtype)
    try:
        return count_flops(lambda: model(image))
    except Exception as error:  # a model raises whatever it likes
        raise ValueError(f'{type(model).__name__} can\'t run on a 1x3x{image_size[0]}x{image_size[1]} image, on '
                         f'which FLOPs are counted ({type(error).__name__}: {error}); set another '
                         'image_size=(height, width)') from error
