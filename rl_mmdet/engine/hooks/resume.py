"""A resumed training goes on as if it had never been interrupted."""
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from ..batches import EndlessBatches, NumberedBatches, number_batches_, seed_from
from ..errors import UserError

PLACE = 'iterations_of_epoch'
"""Key in a checkpoint's ``meta``: how many iterations of the epoch that was going on are done."""
RATES = ('lr', 'initial_lr', 'max_lr', 'min_lr')


@HOOKS.register_module()
class ResumeHook(Hook):
    """Let a resumed training be the same as one that was never interrupted.

    Every iteration, and the data of every batch, draw random numbers with a seed of their own, computed from the run's
    seed, their number and the process's; so there are no states of generators to keep. A checkpoint from the middle of
    an epoch goes on with the batches that are left of it.

    The learning rate and the weight decay are the config's: where the config's rate has changed since the checkpoint,
    the rate that the schedule has come to changes in the same proportion.

    Raises:
        UserError: the optimizer's groups aren't those of the checkpoint.
    """
    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.place = 0
        self.batches: NumberedBatches | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not runner._resume:
            return
        self.place = checkpoint['meta'].get(PLACE, 0)
        if 'optimizer' in checkpoint and isinstance(runner.optim_wrapper, OptimWrapper):
            _use_settings_(checkpoint, runner.optim_wrapper)

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        self.batches = number_batches_(loop.dataloader, runner.seed)
        if self.batches is None:
            return
        if isinstance(loop, IterBasedTrainLoop):
            self.batches.skip = runner.iter
            loop.fast_forward_on_resume = False
            loop.dataloader_iterator = EndlessBatches(loop.dataloader, runner.iter)
        else:
            self.batches.skip = self.place

    def before_train_epoch(self, runner: Runner) -> None:
        if self.batches is not None and not isinstance(runner.train_loop, IterBasedTrainLoop):
            self.batches.epoch = runner.epoch

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        seed = seed_from(runner.seed, runner.iter, get_rank())
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        self.place += 1

    def after_train_epoch(self, runner: Runner) -> None:
        self.place = 0

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['meta'][PLACE] = self.place


def _use_settings_(checkpoint: dict, optim_wrapper: OptimWrapper) -> None:
    """Put the config's learning rates and weight decays in the place of a checkpoint's."""
    saved, groups = checkpoint['optimizer'], optim_wrapper.optimizer.param_groups
    sizes = [[len(group['params']) for group in each] for each in (saved['param_groups'], groups)]
    if sizes[0] != sizes[1]:
        raise UserError(f'resume: the optimizer has {len(sizes[1])} groups with {sum(sizes[1])} parameters here, and '
                        f'{len(sizes[0])} with {sum(sizes[0])} in the checkpoint; resume with the optim_wrapper '
                        '(constructor, paramwise_cfg) and frozen stages that it was trained with, or set load_from to '
                        'begin with its weights')
    base = saved.get('base_param_settings')
    ratios = [_use_group_(old, new) for old, new in zip(
        [*saved['param_groups'], *([base] if base else [])], optim_wrapper.param_groups, strict=False)]
    schedules = checkpoint.get('param_schedulers')
    for schedule in schedules if isinstance(schedules, list) else ():
        for name in ('base_values', '_last_value'):
            values = schedule.get(name)
            if schedule.get('param_name') == 'lr' and isinstance(values, list) and len(values) == len(ratios):
                schedule[name] = [value * ratio for value, ratio in zip(values, ratios, strict=True)]


def _use_group_(old: dict[str, Any], new: Mapping[str, Any]) -> float:
    """Let a saved group have another's weight decay and learning rate; how much the rate is multiplied by."""
    if 'weight_decay' in new:
        old['weight_decay'] = new['weight_decay']
    before, now = (group.get('initial_lr', group['lr']) for group in (old, new))
    if before == now:
        return 1.
    if not before:
        old['lr'] = old['initial_lr'] = now
        return 1.
    old.update({name: old[name] * now / before for name in RATES if name in old})
    if 'initial_lr' in old:
        old['initial_lr'] = now  # without rounding
    return now / before
