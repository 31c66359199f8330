"""A float ONNX graph of a backbone and neck made an int8 one, and what that costs in AP and spares in time."""
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from mmdet.models.detectors import BaseDetector
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..engine import UserError
from ..engine.preflight.guard import built, quiet
from .onnx_session import OnnxSession

CALIBRATION_IMAGES = 64
ROUNDS, CALLS = 7, 5
"""Rounds in which both graphs take turns, and the calls of each in a round, of which the fastest counts."""


class Int8(NamedTuple):
    """What :func:`quantise_` has done.

    Args:
        calibrated: val images from which the ranges of the activations were taken.
        images: val images on which AP was measured.
        before: what the config's evaluator says of the float detector, e.g. ``{'coco/bbox_mAP': 0.4}``; nothing where
            it detects nothing.
        after: the same with the int8 graph as backbone and neck.
        size: sizes of the files in bytes, float and int8.
        ratios: time that the int8 graph takes for an image, over the float graph's, in each round.
    """
    calibrated: int
    images: int
    before: dict[str, float]
    after: dict[str, float]
    size: tuple[int, int]
    ratios: list[float]

    def describe(self) -> str:
        """One line for the user."""
        scores = ', '.join(f'{name} {self.before.get(name, 0):.3f} → {self.after.get(name, 0):.3f}'
                           for name in dict.fromkeys([*self.before, *self.after])) or 'nothing is detected'
        old, new = (size / 1e6 for size in self.size)
        return (f'int8, calibrated on {self.calibrated} val images; on {self.images}: {scores}; '
                f'{old:.1f} MB → {new:.1f} MB; time for an image over the float graph\'s, both on this CPU: '
                f'{median(self.ratios):.2f} ({min(self.ratios):.2f} to {max(self.ratios):.2f})')


def quantise_(file: Path, detector: BaseDetector, cfg: Config, loader: DataLoader) -> Int8:
    """Replace a float graph by an int8 one, by onnxruntime's static quantisation, and measure what it does.

    Weights get one scale per output channel, activations one scale and zero point per tensor, from their smallest and
    largest value on images spread over the val set.

    Args:
        file: the float graph of the detector's backbone and neck; it is replaced.
        detector: the float detector, in eval mode.
        cfg: its config, of which ``val_evaluator`` is used.
        loader: its val set, one image at a time.

    Raises:
        UserError: the config has no ``val_evaluator``, or onnxruntime can't quantise the graph.
    """
    before = _evaluate(detector, cfg, loader, 'float')
    count = min(CALIBRATION_IMAGES, len(loader.dataset))
    chosen = [number * len(loader.dataset) // count for number in range(count)]
    spread = DataLoader(Subset(loader.dataset, chosen), collate_fn=loader.collate_fn)
    images = (detector.data_preprocessor(batch, False)['inputs'] for batch in spread)  # not all in memory at a time
    with tempfile.TemporaryDirectory() as folder:
        quantised = Path(folder, 'int8.onnx')
        _quantise(file, quantised, images)
        graphs = OnnxSession(file), OnnxSession(quantised)
        with _features_by(detector, graphs[1]):
            after = _evaluate(detector, cfg, loader, 'int8')
        size = file.stat().st_size, quantised.stat().st_size
        file.write_bytes(quantised.read_bytes())
    image = detector.data_preprocessor(next(iter(spread)), False)['inputs']
    return Int8(count, len(loader.dataset), before, after, size, _time_ratios(*graphs, image))


def _quantise(file: Path, out: Path, images: Iterator[Tensor]) -> None:
    """Write the int8 graph."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        """Hands out the images one by one, then None."""

        def get_next(self) -> dict | None:
            image = next(images, None)
            return None if image is None else dict(images=image.numpy())

    prepared = out.with_name('prepared.onnx')
    try:
        with quiet():
            quant_pre_process(file, prepared, skip_symbolic_shape=True)  # which free sizes make incomplete
            quantization.quantize_static(prepared, out, Images(), per_channel=True,
                                         quant_format=quantization.QuantFormat.QDQ)
    except Exception as error:  # onnxruntime raises whatever it likes
        raise UserError(f'onnxruntime can\'t make this graph an int8 one ({type(error).__name__}: {error}); without '
                        '--int8 it is written as a float one') from error


@torch.no_grad()
def _evaluate(detector: BaseDetector, cfg: Config, loader: DataLoader, title: str) -> dict[str, float]:
    """The config's evaluation of a detector: its mean APs, or all it gives if it has none."""
    def build(cfg: Config) -> Evaluator:
        evaluator = Runner.build_evaluator(None, cfg.val_evaluator)  # which needs nothing of a runner
        evaluator.dataset_meta = loader.dataset.metainfo
        return evaluator
    evaluator = built(cfg, 'val_evaluator', build, must=True)
    for batch in tqdm(loader, title, unit='image', mininterval=1, leave=False):
        evaluator.process(detector.val_step(batch), batch)
    with quiet():
        metrics = evaluator.evaluate(len(loader.dataset))
    return {name: value for name, value in metrics.items() if name.endswith('mAP')} or metrics


@contextmanager
def _features_by(detector: BaseDetector, graph: OnnxSession) -> Iterator[None]:
    """Meanwhile the detector's feature maps come from a graph."""
    detector.extract_feat = graph  # hides the class's method
    try:
        yield
    finally:
        del detector.extract_feat


def _time_ratios(old: OnnxSession, new: OnnxSession, image: Tensor) -> list[float]:
    """The new graph's time for an image over the old one's, in rounds in which they take turns."""
    ratios = []
    for _ in range(ROUNDS):
        taken = {old: [], new: []}
        for graph in (old, new) * CALLS:
            start = time.perf_counter()
            graph(image)
            taken[graph].append(time.perf_counter() - start)
        ratios.append(min(taken[new]) / min(taken[old]))
    return ratios
