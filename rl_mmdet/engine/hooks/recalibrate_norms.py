"""Fresh BatchNorm statistics for replaced blocks before the first step."""
from collections.abc import Callable, Iterator, Mapping

import torch
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Subset

from ...replacement import recalibrate_norms_, stale_norms
from ...replacement.checks import check_number
from ..detectors import inner_detectors, plain_model


@HOOKS.register_module()
class RecalibrateNormsHook(Hook):
    """Recalibrate the BatchNorm statistics of replaced blocks that were initialised from a baseline's weights.

    mmdet trains with ``norm_eval=True``, so a replaced block, whose weights are new, would otherwise use the removed
    block's statistics for the whole training. This hook works once, after loading and before the first step, and not
    in a resumed training. Under DDP every process sees its own batches and the statistics are averaged.

    Args:
        num_batches: batches of the training set per process, augmented as in training.

    Raises:
        ValueError: ``num_batches`` below 1.
    """

    def __init__(self, num_batches: int = 20) -> None:
        self.num_batches = check_number('RecalibrateNormsHook: num_batches', num_batches, whole=True, least=1)

    def before_train(self, runner: Runner) -> None:
        self.recalibrate(runner)

    def recalibrate(self, runner: Runner) -> None:
        """Recalibrate now, if the weights of some replaced blocks are newer than their statistics."""
        model = plain_model(runner)
        mode = model.training
        model.train()
        if stale_norms(model):
            count = recalibrate_norms_(model, self._batches(runner), run=_feature_extractor(model),
                                       reduce=lambda tensor: all_reduce(tensor, op='mean'))
            print_log(f'recalibrated {count} BatchNorms of replaced blocks on {self.num_batches} batches', 'current')
        model.train(mode)

    def _batches(self, runner: Runner) -> Iterator[dict]:
        """This process's share of random batches of the training set."""
        loader = runner.train_dataloader
        size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
        order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(runner.seed or 0))
        mine = order[get_rank()::get_world_size()][:self.num_batches * size].tolist()
        return iter(DataLoader(Subset(loader.dataset, mine), batch_size=size, collate_fn=loader.collate_fn))


def _feature_extractor(model: nn.Module) -> Callable[[dict], None]:
    """A function that sends a batch through each detector in the model that has stale norms; else through the model."""
    detectors = inner_detectors(model, stale_norms) or {'': model}  # such as mmpretrain's classifiers

    def run(batch: dict) -> None:
        inputs = model.data_preprocessor(batch, True)['inputs']
        for images in inputs.values() if isinstance(inputs, Mapping) else [inputs]:  # one for each branch, or all
            images = images.flatten(0, -4) if images.ndim > 4 else images  # frames of videos are images here
            for detector in detectors.values():
                detector.extract_feat(images)

    return run
