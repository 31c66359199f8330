"""One model of the zoo, as mmdet has it and with replaced backbones: build, train one step, predict."""
import gc
import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from mmdet.models import DIIHead
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from rl_mmdet.engine import UserError, build_model
from rl_mmdet.engine.config import for_one_process
from rl_mmdet.replacement import computing_layers, set_step_

from .batches import keep_size_, prediction_batch, trained_part, training_batch
from .configs import ZooConfig, number_of_classes, read_config, with_few_regions
from .reasons import short_reason
from .swap import plans_that_fit, swap_backbones

RUNS, FAILS, NO_BLOCK, NOT_TRIED = 'runs', 'fails', 'no replaceable block', 'not tried'
SIZES = (64, 256, 384)
"""Sides of the square images in pixels; the larger ones for models that can't take the smaller."""
REFUSALS = ('replaces no block of this model', 'the model has no chain of blocks')
"""What :func:`~rl_mmdet.replacement.replace_blocks_` says where nothing can be replaced."""
OPTIMIZER = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-4), constructor='RLOptimWrapperConstructor')


@dataclass(frozen=True)
class Result:
    """What came of one model.

    Args:
        config: name of the config it was read from.
        baseline: ``'runs'`` or ``'fails'``; ``'not tried'`` if there was no time for it.
        rl: the same of the replaced model; ``'no replaceable block'``; ``'not tried'`` where the baseline fails.
        reason: of the failure, or the refusal's text.
        replaced: number of blocks replaced.
        size: side of the images, pixels.
        seconds: what all of it took.
    """
    config: str
    baseline: str
    rl: str = NOT_TRIED
    reason: str = ''
    replaced: int = 0
    size: int = 0
    seconds: float = 0.


class Failure(Exception):
    """A model doesn't run; the text is the reason."""


def check_steps(config: str | ZooConfig, quick: bool = False) -> Iterator[Result]:
    """Build, train one step and predict: with a config's model, then with its replaced twin.

    Args:
        config: one of mmdet's configs, or its name.
        quick: let both look at few regions of an image.

    Yields:
        What is known when the baseline has run, if it does, and then all.
    """
    start = time.monotonic()
    config = read_config(config) if isinstance(config, str) else config
    result = Result(config.name, FAILS, reason=config.reason)
    if config.model is not None:
        model = for_one_process(with_few_regions(config.model) if quick else config.model)
        try:
            size, learning = _run_baseline(model)
            result = replace(result, baseline=RUNS, size=size)
            yield result
            result = _check_replaced(result, model, learning)
        except Failure as failure:
            which = dict(rl=FAILS) if result.baseline == RUNS else {}
            result = replace(result, reason=str(failure), **which)
    yield replace(result, seconds=round(time.monotonic() - start, 1))


def _run_baseline(cfg: dict[str, Any]) -> tuple[int, set[str]]:
    """The smallest size that works, and the names of the parameters that got a gradient."""
    with _stage('build'):
        model = _build(cfg)
    for size in SIZES:
        try:
            return size, set(_run(model, size, number_of_classes(cfg)))
        except Failure:
            if size == SIZES[-1]:
                raise


def _check_replaced(result: Result, cfg: dict[str, Any], learning: set[str]) -> Result:
    """The result with what came of the replaced model."""
    gc.collect()  # the baseline's memory
    with _stage('build'):
        model, refusal = _build_replaced(cfg)
    if model is None:
        return replace(result, rl=NO_BLOCK, reason=refusal)
    layers = computing_layers(trained_part(model))
    gradients = _run(model, result.size, number_of_classes(cfg))
    for name in layers:
        _check_gradient(name, gradients, learning)
    return replace(result, rl=RUNS, replaced=len(layers))


def _check_gradient(name: str, gradients: Mapping[str, Tensor], learning: set[str]) -> None:
    """A replaced block learns if the baseline's block does."""
    own = [gradient for key, gradient in gradients.items() if key.startswith(f'{name}.')]
    if not own and any(key.startswith(f'{name}.') for key in learning):
        raise Failure(f'{name} gets no gradient, the baseline\'s block does')
    if not all(torch.isfinite(gradient).all() for gradient in own):
        raise Failure(f'{name} has a gradient that isn\'t finite')


def _build(cfg: dict[str, Any]) -> nn.Module:
    """The model of a config, with initial weights."""
    _seed()
    model = build_model(Config(dict(model=deepcopy(cfg))))
    model.init_weights()
    for module in model.modules():
        if isinstance(module, DIIHead):  # untrained, it puts boxes where mmdet can't paste their masks on a CPU
            nn.init.zeros_(module.fc_reg.weight)
    return model


def _build_replaced(cfg: dict[str, Any]) -> tuple[nn.Module | None, str]:
    """The replaced model, or why nothing of it can be replaced."""
    try:
        return _build(swap_backbones(cfg)), ''
    except UserError as error:
        if not any(refusal in str(error) for refusal in REFUSALS):
            raise
        plans = plans_that_fit(cfg)
        return (_build(swap_backbones(cfg, *plans)), '') if any(plans) else (None, short_reason(error))


def _run(model: nn.Module, size: int, classes: int) -> dict[str, Tensor]:
    """One training step and one prediction; the gradients by parameter name."""
    _seed()
    keep_size_(model, size)
    with _stage('training step'):
        part = trained_part(model)
        losses, gradients = _train_step(part, training_batch(part, size, classes))
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise Failure(f'training step: {name} is {loss}')
    model.eval()
    with _stage('prediction'), torch.no_grad():
        predictions = model.test_step(prediction_batch(model, size))
    if len(predictions) != 1:
        raise Failure(f'prediction: {len(predictions)} for one image')
    return gradients


def _train_step(model: nn.Module, batch: dict[str, Any]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of one step, by name."""
    model.train()
    set_step_(model, 0, staggered=False)  # a step in which all replaced blocks learn
    for progress in ('iter', 'epoch'):  # some models ask MMEngine's runner how far it is
        MessageHub.get_current_instance().update_info(progress, 0)
    wrapper = build_optim_wrapper(model, deepcopy(OPTIMIZER))
    wrapper.zero_grad = lambda **_: None  # after the step the gradients stay
    losses = model.train_step(batch, wrapper)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: float(torch.as_tensor(loss).detach()) for name, loss in losses.items()}, gradients


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Whatever is raised meanwhile becomes a Failure with a short reason."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:  # models raise whatever they like
        raise Failure(short_reason(error, name)) from error
