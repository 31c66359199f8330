"""A training step on synthetic data: the same work at every call, whatever the weights."""
from copy import deepcopy

import pytest
import torch
from torch import nn

from rl_mmdet.engine import build_model, load_config
from training_step import backbone_step, counted_regions, detector_step


class TwoMaps(nn.Module):
    """A backbone whose first map depends on nothing that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, stride=2)
        self.first.requires_grad_(False)

    def forward(self, images):
        middle = self.first(images)
        return middle, self.second(middle)


def gradients(step):
    step.forward_backward()
    found = {name: parameter.grad.clone() for name, parameter in step.model.named_parameters()
             if parameter.grad is not None}
    step.optimizer.zero_grad()
    return found


def test_backbone_step_has_the_same_gradients_at_every_call_and_keeps_the_weights():
    step = backbone_step(TwoMaps(), (8, 6))
    before = deepcopy(step.model.state_dict())
    first = gradients(step)
    step()
    second = gradients(step)
    assert set(first) == {'second.weight', 'second.bias'}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], tensor) for name, tensor in step.model.state_dict().items())
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_backbone_step_gives_images_in_the_models_memory_format_and_autocasts():
    seen = []
    backbone = TwoMaps().to(memory_format=torch.channels_last)
    backbone.first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output, = backbone_step(backbone, (8, 6), batch=2, amp=torch.bfloat16).forward()
    assert seen[0].shape == (2, 3, 8, 6)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    assert output.dtype == torch.bfloat16


@pytest.fixture
def detector(tiny_config):
    def build(seed):
        torch.manual_seed(seed)
        return build_model(load_config(tiny_config('faster-rcnn_r34_fpn_digits.py'))).train()
    return build


@pytest.mark.parametrize('amp', [None, torch.bfloat16])
def test_detector_step_works_on_the_same_regions_whatever_the_weights(detector, amp):
    regions, inputs = [], []
    for seed in (0, 1):
        step = detector_step(detector(seed), (64, 96), amp=amp)
        step.model.roi_head.bbox_roi_extractor.register_forward_pre_hook(lambda _, args: inputs.append(args[1]))
        torch.manual_seed(0)
        with counted_regions(step.model) as seen:
            step()
        regions.append(seen)
    assert regions[0] == regions[1]
    assert regions[0]['roi_head.bbox_head'] > 0
    assert torch.equal(*inputs)


def test_counted_regions_stops_counting(detector):
    step = detector_step(detector(0), (64, 64))
    with counted_regions(step.model) as seen:
        pass
    step()
    assert seen == {}
