"""Finding the detectors in a model: it may be one, or contain some, as a tracker or a teacher with a student does."""
from collections.abc import Callable

from mmdet.models.detectors import BaseDetector
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn


def plain_model(runner: Runner) -> nn.Module:
    """A runner's model without the wrapper that DDP and the like put around it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def inner_detectors(model: nn.Module, wanted: Callable[[nn.Module], object]) -> dict[str, BaseDetector]:
    """The innermost detectors in ``model`` (itself included, as ``''``) for which ``wanted`` is true, by name."""
    detectors = {name: module for name, module in model.named_modules()
                 if isinstance(module, BaseDetector) and wanted(module)}
    return {name: detector for name, detector in detectors.items()
            if not any(inner in detectors.values() for inner in list(detector.modules())[1:])}
