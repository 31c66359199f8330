"""Ground truth and detections side by side."""
import cv2
import numpy as np

from rl_mmdet.analysis.picture import save_side_by_side


def test_save_side_by_side_draws_each_sources_boxes_in_its_own_column(tmp_path):
    cv2.imwrite(str(tmp_path / 'image.png'), np.full((64, 64, 3), 255, np.uint8))
    box = (np.array([10., 10., 40., 40.]), '7', None)
    save_side_by_side(tmp_path / 'out' / 'picture.png', [str(tmp_path / 'image.png')],
                      {'ground truth': [[box]], 'nothing found': [[]]})
    picture = cv2.imread(str(tmp_path / 'out' / 'picture.png'))
    left, right = np.array_split(picture, 2, axis=1)
    green = np.array([44, 160, 44])
    assert (np.abs(left.astype(int) - green).sum(axis=2) < 30).sum() > 100
    assert (np.abs(right.astype(int) - green).sum(axis=2) < 30).sum() == 0
