"""A tiny CIFAR-10."""
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import encode_jpeg


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., Path]:
    """Write an npz in which all pixels of an image are 25 times its label; returns its path."""
    def write(train: int = 16, test: int = 10) -> Path:
        arrays = {}
        for split, count in (('train', train), ('test', test)):
            labels = np.arange(count, dtype=np.uint8) % 10
            files = [encode_jpeg(torch.full((3, 32, 32), 25 * int(label), dtype=torch.uint8)).numpy()
                     for label in labels]
            arrays |= {f'{split}_labels': labels, f'{split}_bytes': np.concatenate(files),
                       f'{split}_offsets': np.cumsum([0, *map(len, files)])}
        np.savez(tmp_path / 'images.npz', **arrays)
        return tmp_path / 'images.npz'
    return write
