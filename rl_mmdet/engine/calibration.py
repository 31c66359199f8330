"""Training images for what is set before the first step, and the way that they take through a model."""
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Subset

from .detectors import inner_detectors


def training_batches(runner: Runner, count: int) -> Iterator[dict]:
    """This process's share of random batches of the training set, ``count`` of them or fewer, augmented as ever.

    All processes have equally many, because SyncBatchNorm waits for all of them in every run.
    """
    loader = runner.train_dataloader
    size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(runner.seed or 0))
    share = math.ceil(len(order) / get_world_size())
    places = get_rank() + get_world_size() * torch.arange(min(share, count * size))
    mine = order[places % len(order)].tolist()
    return iter(DataLoader(Subset(loader.dataset, mine), batch_size=size, collate_fn=loader.collate_fn,
                           num_workers=loader.num_workers, worker_init_fn=loader.worker_init_fn))


def images_of(model: nn.Module, batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """The images of a batch as the model's backbone gets them: one tensor, or one for each branch of the model."""
    inputs = model.data_preprocessor(batch, True)['inputs']
    found = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    return [images.flatten(0, -4) if images.ndim > 4 else images for images in found]  # frames of videos are images


def feature_extractor(model: nn.Module, wanted: Callable[[nn.Module], object]) -> Callable[[nn.Module, list], None]:
    """A function that sends images through the wanted detectors in ``model``, or in another model built alike.

    A model without a detector, such as a classifier, is run as a whole.
    """
    names = list(inner_detectors(model, wanted)) or ['']

    def run(whole: nn.Module, inputs: list[torch.Tensor]) -> None:
        for images in inputs:
            for name in names:
                whole.get_submodule(name).extract_feat(images)

    return run
