"""Small synthetic batches, of the kind that a model trains on and predicts from."""
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from mmdet.models import (
    BaseMOTModel,
    DetDataPreprocessor,
    FastRCNN,
    FusedSemanticHead,
    Mask2FormerVideo,
    MaskTrackRCNN,
    QDTrack,
    SemiBaseDetector,
)
from mmdet.models.data_preprocessors.data_preprocessor import BatchFixedSizePad, BatchResize
from mmdet.testing import demo_mm_inputs, demo_mm_proposals, demo_track_inputs
from torch import nn

VIDEO = (Mask2FormerVideo, MaskTrackRCNN, QDTrack)
"""Models that train on pairs of frames; mmdet trains its other trackers' detectors alone."""
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def trained_part(model: nn.Module) -> nn.Module:
    """What a training step is for: the model, or the detector of a tracker that has no training of its own."""
    if not isinstance(model, BaseMOTModel) or isinstance(model, VIDEO):
        return model
    if not isinstance(model.detector.data_preprocessor, DetDataPreprocessor):
        model.detector.data_preprocessor = DetDataPreprocessor(MEAN, STD, pad_size_divisor=32)
    return model.detector


def training_batch(model: nn.Module, size: int, classes: int) -> dict[str, Any]:
    """Two images with all that the model learns from, the same at every call.

    Args:
        model: what is trained.
        size: height and width in pixels.
        classes: number of labels there may be.
    """
    if isinstance(model, VIDEO):
        return demo_track_inputs(num_frames=2, key_frames_inds=[0], image_shapes=(3, size, size), num_items=[2],
                                 num_classes=2, with_mask=True)
    kinds = {type(module) for module in model.modules()}
    shape = _shape(model, size)
    batch = demo_mm_inputs(image_shapes=shape, num_items=[1, 2], num_classes=min(max(classes, 2), 10),
                           with_mask=has_masks(model), with_semantic=True,
                           sem_seg_output_strides=8 if FusedSemanticHead in kinds else 1)
    for sample in batch['data_samples']:
        sample.gt_instances.labels %= classes
    if isinstance(model, FastRCNN):
        _add_proposals_(batch, shape)
    _add_lines_(batch, shape)
    return _in_branches(batch) if isinstance(model, SemiBaseDetector) else batch


def prediction_batch(model: nn.Module, size: int) -> dict[str, Any]:
    """One image, or a video of two frames."""
    shape = _shape(model, size)
    if isinstance(model, BaseMOTModel):
        return demo_track_inputs(num_frames=2, image_shapes=shape)
    batch = demo_mm_inputs(1, image_shapes=shape)
    if isinstance(model, FastRCNN):
        _add_proposals_(batch, shape)
    _add_lines_(batch, shape)
    return batch


def keep_size_(model: nn.Module, size: int) -> None:
    """Let data preprocessors that pad or resize every batch to one large size keep it at ``size``, to spare time."""
    for module in model.modules():
        for augment in getattr(module, 'batch_augments', None) or []:
            if isinstance(augment, BatchFixedSizePad):
                augment.size = (size, size)
            if isinstance(augment, BatchResize):
                augment.min_size = augment.max_size = size


def _shape(model: nn.Module, size: int) -> tuple[int, int, int]:
    head = getattr(model, 'bbox_head', None)  # CLRNet's, which the onedl packages alone have, is made for one size
    return (3, head.img_h, head.img_w) if hasattr(head, 'img_h') else (3, size, size)


def has_masks(model: nn.Module) -> bool:
    """Whether a part of the model is for masks; some label assigners of models without take masks amiss."""
    return any('mask' in name for name, _ in model.named_modules())


def _add_proposals_(batch: dict[str, Any], shape: tuple[int, int, int]) -> None:
    samples = batch['data_samples']
    for sample, proposals in zip(samples, demo_mm_proposals([shape] * len(samples), 50), strict=True):
        sample.proposals = proposals


def _add_lines_(batch: dict[str, Any], shape: tuple[int, int, int]) -> None:
    """One vertical line in the middle of each image: valid, from the bottom, upright, over half of the rows."""
    _, height, width = shape
    line = np.full(6 + 72, -1e5, dtype=np.float32)
    line[:6] = 0, 1, 0, width / 2, 0.5, 36
    line[6:6 + 36] = width / 2
    for sample in batch['data_samples']:
        sample.lines_array, sample.org_height, sample.org_width = line[None], height, width


def _in_branches(batch: dict[str, Any]) -> dict[str, Any]:
    """The same images with labels, and as if without for teacher and student."""
    unlabelled = deepcopy(batch)
    for sample in unlabelled['data_samples']:
        sample.set_metainfo(dict(homography_matrix=torch.eye(3).numpy()))
    branches = dict(sup=batch, unsup_teacher=unlabelled, unsup_student=deepcopy(unlabelled))
    return {key: {branch: data[key] for branch, data in branches.items()} for key in batch}
