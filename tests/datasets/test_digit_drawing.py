"""What a digit scene shows, and how its annotations describe it."""

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from rl_mmdet.datasets import digit_drawing
from rl_mmdet.datasets.digit_drawing import SceneSettings, digit_samples, draw_scene

SIZE = (128, 96)
SCALES = (12, 40)


def draw_scenes(split='train', **settings):
    """The first 20 scenes of a split: pairs of image and annotations."""
    settings = SceneSettings(1, SIZE, scales=SCALES, **settings)
    _, samples, labels = digit_samples(split)
    return [draw_scene(settings, split, index, samples, labels) for index in range(20)]


def test_digit_samples_of_train_and_val_are_disjoint_and_stratified():
    train, train_images, train_labels = digit_samples('train')
    val, val_images, val_labels = digit_samples('val')
    assert not set(train) & set(val)
    assert len(train) + len(val) == 1797
    shares = np.bincount(train_labels) / (np.bincount(train_labels) + np.bincount(val_labels))
    np.testing.assert_allclose(shares, 0.75, atol=0.01)
    pictures = {image.tobytes() for image in train_images}
    assert not pictures & {image.tobytes() for image in val_images}


def test_draw_scene_boxes_enclose_exactly_the_ink(monkeypatch):
    placed = []
    find_place = digit_drawing._find_place

    def recorded(rng, owner, alpha, *args):
        placed.append((find_place(rng, owner, alpha, *args), alpha))
        return placed[-1][0]

    monkeypatch.setattr(digit_drawing, '_find_place', recorded)
    scenes = draw_scenes(digits_per_image=(1, 1))
    for (_, (annotation,)), ((left, top, _, _), alpha) in zip(scenes, placed, strict=True):
        rows, columns = np.nonzero(alpha >= 0.5)
        x, y, width, height = annotation['bbox']
        assert (x, y) == (left + columns.min(), top + rows.min())
        assert (width, height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
        assert annotation['area'] == len(rows)


def test_draw_scene_outlines_lie_in_their_boxes_and_cover_the_ink():
    for image, annotations in draw_scenes():
        for annotation in annotations:
            outlines = annotation['segmentation']
            assert all(len(polygon) >= 6 for polygon in outlines)
            mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(outlines, *image.shape[:2])))
            x, y, width, height = annotation['bbox']
            assert mask[y:y + height, x:x + width].sum() == mask.sum()
            assert mask.sum() >= 0.75 * annotation['area']


def test_draw_scene_ink_stands_out_from_what_is_beneath():
    for image, (annotation,) in draw_scenes(digits_per_image=(1, 1), clutter=(0, 0)):
        ink = np.zeros(image.shape[:2], np.uint8)
        outlines = [np.array(p).reshape(-1, 2).astype(int) for p in annotation['segmentation']]
        cv2.fillPoly(ink, outlines, 1)
        x, y, width, height = annotation['bbox']
        region, ink = image[y:y + height, x:x + width], ink[y:y + height, x:x + width] > 0
        assert abs(region[ink].mean() - region[~ink].mean()) > 20


def test_draw_scene_boxes_keep_the_overlap_cap_inside_the_image():
    touching = 0
    for _, annotations in draw_scenes('val', digits_per_image=(6, 12), max_overlap=0.3):
        boxes = np.array([a['bbox'] for a in annotations], float)
        boxes[:, 2:] += boxes[:, :2]
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= SIZE).all()
        starts = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        ends = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        shared = np.clip(ends - starts, 0, None).prod(-1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        iou = shared / (areas[:, None] + areas[None] - shared)
        np.fill_diagonal(iou, 0)
        assert iou.max(initial=0) <= 0.3
        touching += np.count_nonzero(iou)
    assert touching > 0
