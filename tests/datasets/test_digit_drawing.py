"""What a digit scene shows, and how its annotations describe it."""
import cv2
import numpy as np
from pycocotools import mask as coco_mask

from rl_mmdet.datasets.digit_drawing import digit_samples, draw_scene

SIZE = (128, 128)
FIRST = [(1, 28, 14, 21, 33), (5, 16, 46, 26, 38), (2, 39, 75, 15, 29), (10, 85, 82, 17, 27), (3, 61, 19, 31, 48),
         (5, 12, 2, 14, 21), (9, 95, 2, 32, 47)]
"""Digit, as category, and box of the digits of the first scene."""


def draw_scenes(split='train'):
    """The first 20 scenes of a split: pairs of image and annotations."""
    _, samples, labels = digit_samples(split)
    return [draw_scene(SIZE, 0, split, index, samples, labels) for index in range(20)]


def decode(annotation, image):
    """The mask that COCO's tools make of the outlines."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(annotation['segmentation'], *image.shape[:2])))


def test_samples_of_train_and_val_are_disjoint_and_stratified():
    train, train_images, train_labels = digit_samples('train')
    val, val_images, val_labels = digit_samples('val')
    assert not set(train) & set(val)
    assert len(train) + len(val) == 1797
    shares = np.bincount(train_labels) / (np.bincount(train_labels) + np.bincount(val_labels))
    np.testing.assert_allclose(shares, 0.75, atol=0.01)
    assert not {image.tobytes() for image in train_images} & {image.tobytes() for image in val_images}


def test_scenes_stay_the_ones_that_results_were_measured_on():
    found = [(annotation['category_id'], *annotation['bbox']) for annotation in draw_scenes()[0][1]]
    np.testing.assert_allclose(found, FIRST, atol=1)  # another OpenCV may move an edge by a pixel


def test_ink_stands_out_inside_the_outlines():
    contrasts = []
    for image, annotations in draw_scenes():
        for annotation in annotations:
            ink = decode(annotation, image) > 0
            x, y, width, height = annotation['bbox']
            box = np.s_[y:y + height, x:x + width]
            contrasts.append(abs(image[box][ink[box]].mean() - image[box][~ink[box]].mean()))
    assert np.quantile(contrasts, 0.05) > 20  # there may be clutter behind the others


def test_outlines_fill_their_boxes_and_cover_the_ink():
    for image, annotations in draw_scenes():
        for annotation in annotations:
            mask = decode(annotation, image)
            np.testing.assert_allclose(cv2.boundingRect(mask), annotation['bbox'], atol=2)
            assert mask.sum() >= 0.75 * annotation['area']


def test_boxes_keep_the_overlap_cap_inside_the_image():
    touching = 0
    for _, annotations in draw_scenes('val'):
        boxes = np.array([a['bbox'] for a in annotations], float)
        boxes[:, 2:] += boxes[:, :2]
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= SIZE).all()
        starts = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        ends = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        shared = np.clip(ends - starts, 0, None).prod(-1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        iou = shared / (areas[:, None] + areas[None] - shared)
        np.fill_diagonal(iou, 0)
        assert iou.max(initial=0) <= 0.1
        touching += np.count_nonzero(iou)
    assert touching > 0
