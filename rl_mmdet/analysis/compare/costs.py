"""What training steps and predictions of whole detectors cost, each detector measured beside the baseline."""
import gc
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mmdet
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub

from ...engine import UserError
from ...engine.files import read_record, write_text
from ...engine.preflight.guard import reason_of
from ..cost import ratios_to, seconds_in_turn
from .comparison import Comparison
from .runs import Say, checkpoint_of
from .subject import Loaders, Subject

TURN, MOST = 0.5, 10
"""Seconds that a turn should last, and most calls in one."""
Times = dict[str, list[float]]
"""Seconds and ratios by the fields of :class:`Cost`."""


@dataclass(frozen=True)
class Cost:
    """What one detector costs.

    Seconds are wall-clock time. Each variant takes turns with the baseline, so variants compare by their ratios, not
    by their seconds; the baseline's lists hold its rounds beside one variant after the other.

    Args:
        trainable: number of parameters that learn.
        step_flops: FLOPs of a training step, by :func:`~rl_mmdet.analysis.count_flops`, without mmcv's own kernels
            (RoIAlign, deformable convolutions): forward, backward, and the optimizer's products of matrices, if any.
        saved_bytes: bytes that the forward pass keeps for backward, parameters and buffers apart; of what runs under
            activation checkpoints (``with_cp``) these are the inputs.
        peak_bytes: bytes that a training step allocates at its peak, gradients included, beyond the model, the
            optimizer's state and the batch as it was loaded.
        peak_of: whose record ``peak_bytes`` is from.
        step_seconds, step_ratios: seconds per training step in each round, and these over the baseline's.
        latency_seconds, latency_ratios: the same of the prediction for one image by the materialized model.
        batch: images per training step.
        image_size: height and width of the padded training batch in pixels.
    """
    trainable: int
    step_flops: int
    saved_bytes: int
    peak_bytes: int
    peak_of: str
    step_seconds: list[float]
    step_ratios: list[float]
    latency_seconds: list[float]
    latency_ratios: list[float]
    batch: int
    image_size: tuple[int, int]


def read_costs(folder: Path) -> dict[str, Any]:
    """What lies in a comparison's costs.json.

    Returns:
        ``costs`` by variant, which are why not where they couldn't be measured; ``environment``: device and versions;
        ``checkpoints``: file name of the weights that each variant had, None for random ones. All empty without file.
    """
    path = folder / 'costs.json'
    if not path.is_file():
        return dict(costs={}, environment={}, checkpoints={})
    return read_record(path, lambda content: dict(
        costs={name: each if isinstance(each, str) else Cost(**each) for name, each in content['costs'].items()},
        environment=dict(content['environment']), checkpoints=dict(content['checkpoints'])))


def environment() -> dict[str, str]:
    """Device and versions in use."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU ({platform.machine()})'
    return dict(device=device, torch=torch.__version__, mmdet=mmdet.__version__, python=platform.python_version())


def measure(comparison: Comparison, say: Say, allow_pickle: bool = False) -> None:
    """Measure all variants with the checkpoints of the first seed, but those that were measured with the same ones.

    All are measured again where the baseline has another checkpoint than before, or on another device or stack.

    Raises:
        UserError: the baseline can't be measured.
    """
    checkpoints = {run.variant: checkpoint_of(run) for run in comparison.runs() if run.seed == 0}
    names = {variant: path and path.name for variant, path in checkpoints.items()}
    before = read_costs(comparison.folder)
    same = dict(before['checkpoints'].items() & names.items())
    kept = {name: cost for name, cost in before['costs'].items() if name in same and isinstance(cost, Cost)}
    if comparison.baseline not in kept or before['environment'] != environment():
        kept = {}
    if names.keys() <= kept.keys():
        say('costs were measured before')
        return
    cfgs = {name: comparison.config(name) for name in names if name == comparison.baseline or name not in kept}
    found = measure_costs(cfgs, checkpoints, say=say, allow_pickle=allow_pickle) | kept
    costs = {name: found[name] for name in names}
    content = dict(costs={name: each if isinstance(each, str) else asdict(each) for name, each in costs.items()},
                   environment=environment(), checkpoints=names)
    write_text(comparison.folder / 'costs.json', json.dumps(content, indent=1))


def measure_costs(cfgs: Mapping[str, Config], checkpoints: Mapping[str, Path | None], rounds: int = 7, *, say: Say,
                  allow_pickle: bool = False) -> dict[str, Cost | str]:
    """Measure detectors on one real batch each, on a GPU if there is one.

    What is measured is ``train_step`` with the config's own optimizer at a learning rate of 0, the same work at every
    step, and ``test_step`` on the first validation image. Hooks, ``compile`` and cuDNN's benchmark mode are left out,
    and gradients aren't accumulated: ``accumulative_counts`` is 1. Without a GPU there is no mixed precision, so an
    ``AmpOptimWrapper`` is measured as an ``OptimWrapper``. Without a checkpoint the weights are random, and the time
    of a prediction is that of a detector which finds little or too much.

    The baseline and one variant are in memory at a time, and while predictions are timed their materialized copies.
    Nothing is written, but by datasets that make their own files.

    Args:
        cfgs: full configs by name, the baseline's first.
        checkpoints: weights to load by the same names; None, or no entry, for random ones.
        rounds: how often baseline and variant take their turns.
        say: gets one line whenever there is progress.
        allow_pickle: see :func:`~rl_mmdet.engine.read_checkpoint`.

    Returns:
        The cost by name; for a variant that can't be measured, why not, in one line.

    Raises:
        UserError: the baseline can't be measured.
    """
    first, *others = cfgs
    loaders = Loaders()

    def count(name: str) -> tuple[Subject, dict[str, Any]]:
        say(f'{name}: building it and counting what a training step does')
        subject = Subject(cfgs[name], checkpoints.get(name), loaders, allow_pickle)
        return subject, subject.counts()

    for progress in ('iter', 'epoch'):  # some models ask MMEngine how far training is
        MessageHub.get_current_instance().update_info(progress, 0)
    found: dict[str, Cost | str] = {}
    turns: list[Times] = []
    try:
        baseline, counts = count(first)
    except Exception as error:  # models raise whatever they like
        raise UserError(f'{first} can\'t be measured: {reason_of(error)}') from error
    for name in others:
        try:
            variant, own_counts = count(name)
            say(f'{name}: timing training steps and predictions, in turn with the baseline\'s')
            times, own_times = _take_turns([baseline, variant], rounds)
            found[name] = Cost(**own_counts, **own_times)
            turns.append(times)
        except Exception as error:
            found[name] = reason_of(error)
            say(f'{name}: can\'t be measured: {found[name]}')
        variant = None
        baseline.optim.zero_grad()  # if it was in the middle of a step
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    turns = turns or _take_turns([baseline], rounds)
    joined = {name: [value for times in turns for value in times[name]] for name in turns[0]}
    return {first: Cost(**counts, **joined)} | found


def _take_turns(subjects: list[Subject], rounds: int) -> list[Times]:
    """The times of one or two detectors, the baseline first."""
    for subject in subjects:
        subject.model.train()
    steps = _in_turn({index: subject.step for index, subject in enumerate(subjects)}, rounds)
    latencies = _in_turn({index: partial(subject.predict, subject.predictor())
                          for index, subject in enumerate(subjects)}, rounds)
    step_ratios, latency_ratios = ratios_to(steps, 0), ratios_to(latencies, 0)
    return [dict(step_seconds=steps[index], step_ratios=step_ratios[index], latency_seconds=latencies[index],
                 latency_ratios=latency_ratios[index]) for index in range(len(subjects))]


def _in_turn(calls: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """Seconds per call in each round; short calls are made several times a turn."""
    seconds = max(min(taken) for taken in seconds_in_turn(calls, rounds=1, per_round=1).values())
    return seconds_in_turn(calls, rounds, per_round=max(1, min(MOST, round(TURN / seconds))))
