"""Detectors inside a model are found, the innermost ones."""
from mmdet.models.detectors import BaseDetector
from torch import nn

from rl_mmdet.engine.detectors import inner_detectors


class Detector(BaseDetector):
    loss = predict = _forward = extract_feat = None

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def everything(_):
    return True


def test_a_single_detector_is_itself():
    model = Detector(backbone=nn.Linear(1, 1))
    assert inner_detectors(model, everything) == {'': model}


def test_a_tracker_has_one_inside():
    tracker = nn.Module()
    tracker.detector = Detector()
    assert inner_detectors(tracker, everything) == {'detector': tracker.detector}


def test_student_and_teacher_stand_for_the_detector_around_them():
    model = Detector(student=Detector(), teacher=Detector())
    assert list(inner_detectors(model, everything)) == ['student', 'teacher']


def test_unwanted_ones_are_left_out():
    model = Detector(student=Detector(head=nn.Linear(1, 1)), teacher=Detector())
    assert list(inner_detectors(model, lambda part: list(part.parameters()))) == ['student']
