"""What computing layers begin with, before the first step: a fit to the removed blocks, fresh norm statistics."""
import time
from functools import partial

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from tqdm import tqdm

from ...replacement import recalibrate_norms_, stale_norms
from ...replacement.checks import check_number
from ...replacement.start import Fade, FitOutputs, Unexplained, fit_outputs_, layers_to_fit
from ..calibration import feature_extractor, images_of, training_batches
from ..detectors import plain_model

REMOVED_BLOCKS = 'removed_blocks'


@HOOKS.register_module()
class StartHook(Hook):
    """Finish what computing layers begin with, once a baseline's weights are loaded and before the first step.

    First it carries out ``replacement.start=dict(type='FitOutputs')``
    (:func:`~rl_mmdet.replacement.fit_outputs_`), in float32 also where training isn't. Then replaced blocks get fresh
    BatchNorm statistics where they have new weights and would run on the removed block's (``norm_eval=True``)
    (:func:`~rl_mmdet.replacement.recalibrate_norms_`). Nothing is done in a resumed training or after a replaced
    model's own checkpoint. The batches are random ones of the training set, the same for the same seed. Under DDP every
    process has its own, and gradients and statistics are averaged.

    With ``fade`` the removed blocks then fade out (:class:`~rl_mmdet.replacement.start.Fade`). Checkpoints hold them as
    long as that lasts, so that a training can be resumed in between.

    Args:
        num_batches: batches per process for the statistics, augmented as in training.

    Raises:
        ValueError: ``num_batches`` below 1.
    """
    priority = 'BELOW_NORMAL'  # after MeanTeacherHook, which gives the teacher the student's weights

    def __init__(self, num_batches: int = 20) -> None:
        self.num_batches = check_number('StartHook: num_batches', num_batches, whole=True, least=1)
        self.fades: dict[str, Fade] = {}
        self.saved: dict[str, dict] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume:
            self.saved = checkpoint.get(REMOVED_BLOCKS, {})

    def before_train(self, runner: Runner) -> None:
        model = plain_model(runner)
        for name, layer in layers_to_fit(model).items():
            if self.saved is None and layer.fit_wanted:
                continue
            if layer.start.fade and name in (self.saved or {}):
                layer.removed.block.load_state_dict(self.saved[name])
            else:
                layer.forget_block_()
        layers = layers_to_fit(model)
        if layers and self.saved is None:
            self._fit(runner, model, next(iter(layers.values())).start)
        self.fades = {name: Fade(layer) for name, layer in layers_to_fit(model).items()}
        self.recalibrate(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        for fade in self.fades.values():
            fade.set_(runner.iter / fade.layer.start.fade)
        self.fades = {name: fade for name, fade in self.fades.items() if fade.layer.removed.block is not None}

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.fades:
            checkpoint[REMOVED_BLOCKS] = {name: fade.block.state_dict() for name, fade in self.fades.items()}

    def recalibrate(self, runner: Runner) -> None:
        """Give fresh statistics now, if the weights of some replaced blocks are newer than theirs."""
        model = plain_model(runner)
        mode = model.training
        model.train()
        if stale_norms(model):
            run = feature_extractor(model, stale_norms)
            count = recalibrate_norms_(model, training_batches(runner, self.num_batches),
                                       run=lambda batch: run(model, images_of(model, batch)), reduce=_average)
            print_log(f'recalibrated {count} BatchNorms of replaced blocks on {self.num_batches} batches', 'current')
        model.train(mode)

    def _fit(self, runner: Runner, model: nn.Module, start: FitOutputs) -> None:
        """Fit all layers of ``model`` that still have their block."""
        run = feature_extractor(model, layers_to_fit)
        mode = model.training
        model.train()
        began = time.monotonic()
        batches = [[images.cpu() for images in images_of(model, batch)]
                   for batch in training_batches(runner, start.batches)]
        device = next(model.parameters()).device
        track = partial(tqdm, desc='computing layers', mininterval=1, leave=False, disable=not is_main_process())
        found = fit_outputs_(
            model, batches, start.steps, start.lr,
            run=lambda whole, inputs: run(whole, [images.to(device) for images in inputs]),
            reduce=_average, track=track, keep=start.fade > 0)
        model.train(mode)
        print_log(f'{len(found)} computing layers fitted to the blocks that they replace in '
                  f'{time.monotonic() - began:.0f} s, on {len(batches)} batches; '
                  f'left unexplained (1: as if left out):\n{_table(found)}', 'current')


def _average(tensor: torch.Tensor) -> None:
    all_reduce(tensor, op='mean')


def _table(found: dict[str, Unexplained]) -> str:
    return '\n'.join(f'  {name}: {error.before:.3f} before, {error.after:.3f} after' for name, error in found.items())
