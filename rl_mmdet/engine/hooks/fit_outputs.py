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

STEPS_TO_ESTIMATE = 5


@HOOKS.register_module()
class FitOutputsHook(Hook):
    """Carry out ``replacement.start=dict(type='FitOutputs')`` once a baseline's weights are loaded.

    It works before the first step, and neither in a resumed training nor after a replaced model's own checkpoint. The
    batches are random ones of the training set, the same for the same seed; they and the fit are in float32, also
    where training isn't. Under DDP every process has its own batches and gradients are averaged, so that all end with
    the same weights. See :func:`~rl_mmdet.replacement.fit_outputs_`.
    """
    priority = 'ABOVE_NORMAL'  # before RecalibrateNormsHook, which then has less to do

    def __init__(self) -> None:
        self.fades: list[Fade] = []

    def before_train(self, runner: Runner) -> None:
        model = plain_model(runner)
        for layer in layers_to_fit(model).values():
            if not layer.fit_wanted:
                layer.forget_block_()
        starts = [layer.start for layer in layers_to_fit(model).values()]
        if starts:
            self._fit(runner, model, starts[0])
            self.fades = [Fade(layer) for layer in layers_to_fit(model).values()]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        for fade in list(self.fades):
            fade.alpha = runner.iter / fade.layer.start.fade
            if fade.alpha >= 1:
                fade.end()
                self.fades.remove(fade)

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
