"""Batches of training data that depend on the run's seed and on their number alone, so that a resumed run gets its own.

What is drawn for a batch, such as flips, doesn't depend on what was drawn before it, nor on the number of workers.
"""
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from torch.utils.data import DataLoader, Dataset, IterableDataset


def seed_from(*numbers: int) -> int:
    """A seed of 32 bits that is computed from these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def number_batches_(loader: DataLoader, seed: int) -> 'NumberedBatches | None':
    """Let a loader seed the random draws of each batch by its number. Nothing, and None, for data without indices."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    batches = NumberedBatches(loader.batch_sampler, seed)
    object.__setattr__(loader, 'batch_sampler', batches)  # DataLoader refuses it, as its iterator could be at work
    loader._iterator = None
    own = getattr(loader.dataset, '__getitems__', None)
    loader.dataset.__getitems__ = partial(_samples, loader.dataset, own)  # what PyTorch's workers call, if it's there
    return batches


class NumberedBatches:
    """A batch sampler that numbers the batches of another one, and can begin in the middle.

    Attributes:
        epoch: passes over the data that are complete.
        skip: how many batches are left out next; they may be several passes.
    """

    def __init__(self, batches: Any, seed: int) -> None:
        self.batches, self.seed = batches, seed
        self.epoch = self.skip = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__['batches'], name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator['NumberedBatch']:
        skip, self.skip = self.skip, 0
        while True:
            sampler = getattr(self.batches, 'sampler', None)
            if callable(getattr(sampler, 'set_epoch', None)):
                sampler.set_epoch(self.epoch)
            number = -1
            for number, indices in enumerate(self.batches):
                if skip:
                    skip -= 1
                else:
                    yield NumberedBatch(indices, seed_from(self.seed, get_rank(), self.epoch, number))
            self.epoch += 1
            if not skip or number < 0:
                return


class NumberedBatch(list):
    """The indices of a batch, and the seed of what is drawn for it."""

    def __init__(self, indices: Sequence = (), seed: int | None = None) -> None:
        super().__init__(indices)
        self.seed = seed


class EndlessBatches:
    """The iterator of an ``IterBasedTrainLoop``. MMEngine's loads what a resumed run has had; this one skips it."""

    def __init__(self, loader: DataLoader, done: int) -> None:
        self.loader, self.done = loader, done
        self.iterator = iter(loader)

    def __next__(self) -> Any:
        if self.done:  # the loop takes and drops as many
            self.done -= 1
            return None
        while True:
            for batch in self.iterator:
                return batch
            self.iterator = iter(self.loader)

    def skip_iter(self, count: int) -> None:
        for _ in range(count):
            next(self)


def _samples(dataset: Dataset, own: Any, batch: Sequence) -> list:
    """The samples of a batch, drawn with its seed."""
    if isinstance(batch, NumberedBatch):
        random.seed(batch.seed)
        np.random.seed(batch.seed)
        torch.default_generator.manual_seed(batch.seed)  # torch.manual_seed would seed GPUs from a worker, too
    return own(batch) if own else [dataset[index] for index in batch]
