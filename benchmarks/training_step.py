"""One training step of a backbone or a detector on synthetic data, the same work at every call, to be measured."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import BaseDetector
from mmdet.models.roi_heads import BBoxHead, FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from mmdet.testing import demo_mm_inputs
from torch import Tensor, nn

from rl_mmdet.replacement import set_step_

BOXES = 10
"""Objects per image, little more than COCO's seven: their masks, which MMDetection copies on the host in every step,
then cost what they cost in a training."""
SGD = dict(lr=0., momentum=0.9, weight_decay=1e-4)
"""mmdet's usual optimizer; at a rate of 0 the weights stay, and with them the work of every step."""
LOSS_SCALE = 512.


class TrainingStep:
    """Forward, loss, backward, SGD and zero_grad of one model.

    Args:
        model: in the mode, on the device and in the memory format to train it in.
        outputs: runs the model and gives the tensors from which backward starts: a loss, or several maps, whose
            gradients are then random and the same at every call.
        amp: autocast's type for the forward pass and the loss, None for none. float16 goes with a loss scale, as in
            MMEngine's ``AmpOptimWrapper``.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[], Sequence[Tensor]],
                 amp: torch.dtype | None = None) -> None:
        self.model = model
        self.outputs = outputs
        self.amp = amp
        self.device = next(model.parameters()).device
        self.steps = 0
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD)
        scaler = partial(torch.amp.GradScaler, self.device.type) if hasattr(torch.amp, 'GradScaler') else (
            torch.cuda.amp.GradScaler)  # before torch 2.3
        self.scaler = scaler(LOSS_SCALE, enabled=amp == torch.float16)
        self.gradients: list[Tensor] | None = None

    def forward(self) -> list[Tensor]:
        """What depends on parameters that learn, of the outputs."""
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            return [output for output in self.outputs() if output.requires_grad]

    def forward_backward(self) -> None:
        """All but the optimizer's part."""
        outputs = self.forward()
        if self.gradients is None:
            self.gradients = [_fixed_gradient(output) for output in outputs]
        torch.autograd.backward(self.scaler.scale(outputs), self.gradients)

    def __call__(self) -> None:
        """The next step of a training: replaced blocks take turns in learning."""
        set_step_(self.model, self.steps)
        self.steps += 1
        self.forward_backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def _fixed_gradient(output: Tensor) -> Tensor:
    if not output.ndim:
        return torch.ones_like(output)
    random = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return torch.empty_like(output).copy_(random / output.numel() ** 0.5)


def backbone_step(backbone: nn.Module, size: tuple[int, int], batch: int = 1,
                  amp: torch.dtype | None = None) -> TrainingStep:
    """A step of a backbone alone on random images; its loss is a fixed random projection of its maps.

    Args:
        backbone: see :class:`TrainingStep`.
        size: height and width in pixels.
        batch: number of images.
        amp: see :class:`TrainingStep`.
    """
    images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    images = _like(backbone, images)
    return TrainingStep(backbone, lambda: backbone(images), amp)


def detector_step(detector: BaseDetector, size: tuple[int, int], batch: int = 1,
                  amp: torch.dtype | None = None) -> TrainingStep:
    """A step of a detector on random images with random boxes, and masks where it has a mask head.

    The last layers of its region proposals are set to zero: then the proposals are the anchors, whatever backbone and
    weights lie below, and all that is compared works on the same regions. Under autocast RoIAlign, non-maximum
    suppression and the losses run in float32: mmcv's kernels don't know bfloat16.

    Args:
        detector: see :class:`TrainingStep`; it is changed.
        size, batch, amp: see :func:`backbone_step`.
    """
    masks = any('mask' in name for name, _ in detector.named_modules())
    data = demo_mm_inputs(batch, [(3, *size)] * batch, [BOXES] * batch, with_mask=masks)
    for sample in data['data_samples']:
        sample.gt_instances.labels.zero_()
        sample.gt_instances.bboxes = _sound_boxes(sample.gt_instances.bboxes, size)
    data = detector.data_preprocessor(data, training=True)
    images = _like(detector, data['inputs'])
    samples = data['data_samples']
    for module in detector.modules():
        if isinstance(module, RPNHead):
            for layer in (module.rpn_cls, module.rpn_reg):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        if amp is not None:
            _keep_float_(module)
    return TrainingStep(detector, lambda: [detector.parse_losses(detector.loss(images, samples))[0]], amp)


def _sound_boxes(boxes: Tensor, size: tuple[int, int], least: float = 4.) -> Tensor:
    """No box is smaller than ``least`` pixels."""
    limit = boxes.new_tensor([size[1], size[0]])
    start = torch.minimum(boxes[:, :2], limit - least)
    return torch.cat([start, torch.maximum(boxes[:, 2:], start + least)], 1)


def _like(model: nn.Module, images: Tensor) -> Tensor:
    """The images on the model's device and in its memory format."""
    images = images.to(next(model.parameters()).device)
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 4 and parameter.shape[2] > 1]
    last = bool(weights) and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    return images.contiguous(memory_format=torch.channels_last) if last else images


def _keep_float_(module: nn.Module) -> None:
    """What goes into RoIAlign and what comes from the heads is float32 from now on."""
    if isinstance(module, BaseRoIExtractor):
        module.register_forward_pre_hook(lambda _, inputs: _as_float(inputs))
    if isinstance(module, (BaseDenseHead, BBoxHead, FCNMaskHead)):
        module.register_forward_hook(lambda _, inputs, outputs: _as_float(outputs))


def _as_float(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_as_float(each) for each in value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def counted_regions(detector: nn.Module) -> Iterator[dict[str, int]]:
    """How many regions each head of a detector's second stage sees meanwhile, by the head's name."""
    seen: dict[str, int] = {}
    hooks = []
    for name, module in detector.named_modules():
        if isinstance(module, (BBoxHead, FCNMaskHead)):
            hooks.append(module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.update({name: seen.get(name, 0) + len(inputs[0])})))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
