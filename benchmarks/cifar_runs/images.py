"""CIFAR-10: decoded once, held on the device, and cropped and flipped there."""
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import decode_jpeg

SPLITS = ('train', 'test')
KEYS = tuple(f'{split}_{part}' for split in SPLITS for part in ('bytes', 'offsets', 'labels'))
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
"""Of CIFAR-10's training images, by channel."""
SIDE, MARGIN = 32, 4
Data = dict[str, Tensor]
"""Of each split ``NAME_images`` (N, 32, 32, 3) of uint8 and ``NAME_labels`` (N,)."""


def read(path: Path, train_images: int | None = None, test_images: int | None = None) -> Data:
    """Read and decode the images, or the first of them.

    Args:
        path: an npz that has for both splits the bytes of all JPEG files in a row, where each begins and the last
            ends, and the labels.
        train_images, test_images: how many; None takes all.

    Raises:
        ValueError: there is no such file, or it is another one.
    """
    if not path.is_file():
        raise ValueError(f'--data {path}: no such file; give an npz with the arrays {", ".join(KEYS)}')
    try:
        arrays = dict(np.load(path))
        missing = [key for key in KEYS if key not in arrays]
    except (OSError, ValueError, TypeError):
        missing = list(KEYS)
    if missing:
        raise ValueError(f'--data {path}: it is no npz with an array {missing[0]}; needed: {", ".join(KEYS)}')
    data = {}
    for split, count in zip(SPLITS, (train_images, test_images), strict=True):
        count = len(arrays[f'{split}_labels']) if count is None else count
        if not 1 <= count <= len(arrays[f'{split}_labels']):
            raise ValueError(f'--{split}-images {count}: {path} has {len(arrays[f"{split}_labels"])}')
        files = torch.from_numpy(arrays[f'{split}_bytes']).tensor_split(
            torch.from_numpy(arrays[f'{split}_offsets'][1:count + 1].astype(np.int64)))[:count]
        data[f'{split}_images'] = torch.stack([decode_jpeg(file).permute(1, 2, 0) for file in files])
        data[f'{split}_labels'] = torch.from_numpy(arrays[f'{split}_labels'][:count].astype(np.int64))
    return data


class TrainingImages:
    """Batches for training on the device: in random order, randomly cropped from a margin of zeros, and flipped.

    Args:
        data: see :data:`Data`.
        batch: images of a batch; what is left at an epoch's end is left out.
        device: where they are.
        seed: makes order, crops and flips; the same on the same device.
    """

    def __init__(self, data: Data, batch: int, device: str, seed: int) -> None:
        self.images = F.pad(data['train_images'].to(device), (0, 0, MARGIN, MARGIN, MARGIN, MARGIN))
        self.labels = data['train_labels'].to(device)
        self.batch = min(batch, len(self.labels))
        self.generator = torch.Generator(device).manual_seed(seed)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.labels) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of the batches of one epoch."""
        order = torch.randperm(len(self.labels), generator=self.generator, device=self.labels.device)
        for chosen in order.split(self.batch)[:len(self)]:
            yield self._crop(chosen), self.labels[chosen]

    def _crop(self, chosen: Tensor) -> Tensor:
        """The chosen images, each with its own crop and flip; one indexing for all."""
        place = torch.arange(SIDE, device=chosen.device)
        down, right = (self._random(2 * MARGIN + 1, chosen) for _ in range(2))
        columns = torch.where(self._random(2, chosen) == 1, place.flip(0), place) + right
        return normalised(self.images[chosen[:, None, None], (place + down)[:, :, None], columns[:, None, :]])

    def _random(self, below: int, like: Tensor) -> Tensor:
        """A column of random integers from 0 to ``below``, one for each of ``like``."""
        return torch.randint(below, (len(like), 1), generator=self.generator, device=like.device)


def normalised(images: Tensor) -> Tensor:
    """(B, H, W, 3) of uint8 as (B, 3, H, W) of float32, channels last in memory, with mean 0 and deviation 1."""
    mean, std = (torch.tensor(each, device=images.device) for each in (MEAN, STD))
    return ((images - mean) / std).permute(0, 3, 1, 2)
