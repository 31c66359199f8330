"""Where the detectors are in a model: it may be one, or a tracker or a teacher and a student that have some."""
from collections.abc import Callable

from mmdet.models.detectors import BaseDetector
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn


def plain_model(runner: Runner) -> nn.Module:
    """A run's model without what DDP and the like wrap around it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def inner_detectors(model: nn.Module, wanted: Callable[[nn.Module], object]) -> dict[str, BaseDetector]:
    """The innermost detectors in ``model`` (itself included, as ``''``) for which ``wanted`` is true, by name."""
    found = {name: part for name, part in model.named_modules() if isinstance(part, BaseDetector) and wanted(part)}
    return {name: part for name, part in found.items()
            if not any(other in found.values() for other in list(part.modules())[1:])}
