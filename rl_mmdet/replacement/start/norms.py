"""BatchNorm of replaced blocks: fresh running statistics for weights that are new."""
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..computing_layer import computing_layers


def stale_norms(model: nn.Module) -> list[_BatchNorm]:
    """BatchNorms that run on the removed block's statistics although the block's weights are new.

    Only those that will stay in eval mode matter (``norm_eval=True``); the others follow by themselves. Call it
    on a model in the mode in which it is trained.
    """
    return [norm for layer in computing_layers(model).values() if layer.norm_stale
            for norm in layer.modules() if _has_statistics(norm) and not norm.training]


@torch.no_grad()
def recalibrate_norms_(model: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any],
                       reduce: Callable[[torch.Tensor], Any] | None = None) -> int:
    r"""Replace the running statistics of stale BatchNorms by the average over some batches.

    .. math:: \hat μ = \tfrac1N \sum_j μ_j, \qquad \hat σ^2 = \tfrac1N \sum_j σ_j^2

    over the batches :math:`j`, with all other norms as they are.

    Args:
        model: in the mode in which it is trained; comes back in it.
        batches: what ``run`` takes, one after the other.
        run: computes the backbone's features of one batch.
        reduce: averages a tensor over processes in place (DDP); None for a single process.

    Returns:
        Number of BatchNorms recalibrated; 0 without stale ones, and then no batch is read.

    Raises:
        ValueError: there is a stale BatchNorm but no batch.
    """
    norms = stale_norms(model)
    if not norms:
        return 0
    count = 0
    with _collecting(norms):
        for batch in batches:
            run(batch)
            count += 1
        if count == 0:
            raise ValueError('no batch to recalibrate BatchNorm statistics on')
    if reduce is not None:
        for norm in norms:
            reduce(norm.running_mean)
            reduce(norm.running_var)
    for layer in computing_layers(model).values():
        layer.norm_stale = False
    return len(norms)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


@contextmanager
def _collecting(norms: list[_BatchNorm]):
    """Let the norms gather a cumulative average from zero; restore their mode, and on failure their numbers."""
    before = [(norm.momentum, norm.running_mean.clone(), norm.running_var.clone(),
               norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    except BaseException:
        for norm, (_, mean, var, tracked) in zip(norms, before, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
            norm.num_batches_tracked.copy_(tracked)
        raise
    finally:
        for norm, (momentum, *_) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()
