"""What a training wrote to MMEngine's ``scalars.json``: curves over its iterations, and what it waited for."""
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Curve = list[tuple[float, float]]
"""Iteration (or epoch) and value, in order."""


@dataclass(frozen=True)
class TrainingLog:
    """The log of one training.

    Args:
        loss: total loss over iterations.
        ap: AP (0 to 1) during training over iterations, by metric (``'bbox'``, ``'segm'``).
        data_share: share of an iteration's time that the training waited for data, 0 to 1 (median over the lines);
            None without such lines.
        peak_gpu_bytes: largest memory of PyTorch's allocator on the GPU; None on a CPU.
    """
    loss: Curve = field(default_factory=list)
    ap: dict[str, Curve] = field(default_factory=dict)
    data_share: float | None = None
    peak_gpu_bytes: int | None = None


def read_training_log(folder: Path) -> TrainingLog:
    """Read the log of a training in its work dir; a resumed one has several files.

    Where iterations were repeated after an interruption, the later values count. A last line that isn't whole, as a
    killed process leaves it, is passed over.
    """
    loss, shares, memory = {}, [], []
    ap: dict[str, dict[float, float]] = {}
    lines = list(_lines(folder))
    epochs: dict[float, float] = {}  # iterations that are done at the end of each; empty for trainings by iteration
    for line in lines:
        if 'epoch' in line and 'loss' in line:
            epochs[line['epoch']] = max(epochs.get(line['epoch'], 0), line['step'])
    for line in lines:
        step = line['step']
        if 'loss' in line:
            loss[step] = line['loss']
            shares += [line['data_time'] / line['time']] if line.get('time') and 'data_time' in line else []
            memory += [line['memory']] if 'memory' in line else []
        for metric in ('bbox', 'segm'):
            if f'coco/{metric}_mAP' in line:
                ap.setdefault(metric, {})[epochs.get(step, step)] = max(0., line[f'coco/{metric}_mAP'])
    return TrainingLog(sorted(loss.items()), {metric: sorted(curve.items()) for metric, curve in ap.items()},
                       statistics.median(shares) if shares else None, max(memory) * 2**20 if memory else None)


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Every whole line with a step, the oldest file's first."""
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and 'step' in line:
                yield line
