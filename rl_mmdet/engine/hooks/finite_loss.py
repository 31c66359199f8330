"""Stop at the first loss that isn't finite, before anything is saved."""
import math

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..errors import NonFiniteLossError


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop training when a loss, or a weight about to be saved, isn't finite.

    It checks every iteration before the checkpoint, EMA and logger hooks run, so the last good checkpoint stays the
    last one. (:class:`mmdet.engine.CheckInvalidLossHook` checks the sum of the losses in every 50th iteration.)

    Raises:
        NonFiniteLossError: names the iteration and the losses, or the weights, that aren't finite.
    """
    priority = 'VERY_HIGH'

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        losses = {name: _number(value) for name, value in (outputs or {}).items()}
        bad = [f'{name}={value}' for name, value in losses.items() if value is not None and not math.isfinite(value)]
        if bad:
            raise NonFiniteLossError(f'iteration {runner.iter + 1}: {", ".join(bad)}; nothing was saved. Go on from '
                                     'the last checkpoint with a lower learning rate, --resume --cfg-options '
                                     'optim_wrapper.optimizer.lr=LR, or clip gradients (optim_wrapper.clip_grad)')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        bad = [name for name, tensor in checkpoint['state_dict'].items()
               if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
        if bad:
            raise NonFiniteLossError(f'iteration {runner.iter}: the weights {", ".join(bad[:3])} aren\'t finite; '
                                     'this checkpoint was not saved, the last one stays')


def _number(value: object) -> float | None:
    """The value of a number or of a tensor with one element, else None."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.detach().item()
    return value if isinstance(value, (int, float)) else None
