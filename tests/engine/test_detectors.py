"""Detectors inside a model are found, the innermost ones."""
from mmdet.models.detectors import BaseDetector
from torch import nn

from rl_mmdet.engine.detectors import inner_detectors


class Detector(BaseDetector):
    loss = predict = _forward = extract_feat = None

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def test_the_innermost_detectors_are_found_that_are_wanted():
    single = Detector(backbone=nn.Linear(1, 1))
    tracker = nn.Module()
    tracker.detector = single
    pair = Detector(student=Detector(head=nn.Linear(1, 1)), teacher=Detector())
    everything = inner_detectors(pair, lambda _: True)
    assert inner_detectors(single, lambda _: True) == {'': single}
    assert inner_detectors(tracker, lambda _: True) == {'detector': single}
    assert list(everything) == ['student', 'teacher']
    assert list(inner_detectors(pair, lambda detector: list(detector.parameters()))) == ['student']
