"""Fit computing layers to the blocks that they replace, before the first step."""
import time
from collections.abc import Iterable, Iterator

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track
from torch import nn

from ...replacement.start import Fade, FitOutputs, Unexplained, fit_outputs_, layers_to_fit
from ..calibration import feature_extractor, images_of, training_batches
from ..detectors import plain_model

REMOVED_BLOCKS = 'removed_blocks'
STEPS_TO_ESTIMATE = 5


@HOOKS.register_module()
class FitOutputsHook(Hook):
    """Carry out ``replacement.start=dict(type='FitOutputs')`` once a baseline's weights are loaded.

    It works before the first step, and neither in a resumed training nor after a replaced model's own checkpoint. The
    batches are random ones of the training set, the same for the same seed; they and the fit are in float32, also
    where training isn't. Under DDP every process has its own batches and gradients are averaged, so that all end with
    the same weights. See :func:`~rl_mmdet.replacement.fit_outputs_`.

    With ``fade`` it then lets the removed blocks fade out (:class:`~rl_mmdet.replacement.start.Fade`). Checkpoints hold
    them as long as that lasts, so that a training can be resumed in between.
    """
    priority = 'ABOVE_NORMAL'  # before RecalibrateNormsHook, which then has less to do

    def __init__(self) -> None:
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
            if name in (self.saved or {}):
                layer.removed.block.load_state_dict(self.saved[name])
            else:
                layer.forget_block_()
        layers = layers_to_fit(model)
        if layers and self.saved is None:
            self._fit(runner, model, next(iter(layers.values())).start)
        self.fades = {name: Fade(layer) for name, layer in layers_to_fit(model).items()}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        for fade in self.fades.values():
            fade.set_(runner.iter / fade.layer.start.fade)
        self.fades = {name: fade for name, fade in self.fades.items() if fade.layer.removed.block is not None}

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.fades:
            checkpoint[REMOVED_BLOCKS] = {name: fade.block.state_dict() for name, fade in self.fades.items()}

    def _fit(self, runner: Runner, model: nn.Module, start: FitOutputs) -> None:
        """Fit all layers of ``model`` that still have their block."""
        run = feature_extractor(model, layers_to_fit)
        mode = model.training
        model.train()
        began = time.monotonic()
        batches = [[images.cpu() for images in images_of(model, batch)]
                   for batch in training_batches(runner, start.batches)]
        count = torch.tensor(len(batches))
        all_reduce(count, op='min')  # SyncBatchNorm waits for all processes in every run
        device = next(model.parameters()).device
        found = fit_outputs_(
            model, batches[:count], start.steps, start.lr,
            run=lambda whole, inputs: run(whole, [images.to(device) for images in inputs]),
            reduce=lambda tensor: all_reduce(tensor, op='mean'), track=_with_estimate, keep=start.fade > 0)
        model.train(mode)
        print_log(f'{len(found)} computing layers fitted to the blocks that they replace in '
                  f'{time.monotonic() - began:.0f} s, on {count} batches; left unexplained (1: as if left out):\n'
                  f'{_table(found)}', 'current')


def _with_estimate(steps: Iterable[int]) -> Iterator[int]:
    """Go through the steps with a progress bar on a terminal, and say in the log how long they will take."""
    steps, began = list(steps), time.monotonic()
    shown = is_main_process() and Console().is_terminal
    for step in track(steps, 'fitting computing layers', disable=not shown):
        if step == STEPS_TO_ESTIMATE < len(steps):
            seconds = (time.monotonic() - began) / step * len(steps)
            print_log(f'fitting computing layers to the blocks that they replace takes about {seconds:.0f} s',
                      'current')
        yield step


def _table(found: dict[str, Unexplained]) -> str:
    return '\n'.join(f'  {name}: {error.before:.3f} before, {error.after:.3f} after' for name, error in found.items())
