"""Ground truth and detections side by side."""
import cv2
import numpy as np

from rl_mmdet.analysis.picture import Panel, side_by_side


def test_side_by_side_draws_each_sources_boxes_in_its_own_column(tmp_path):
    cv2.imwrite(str(tmp_path / 'image.png'), np.full((64, 64, 3), 255, np.uint8))
    box = (np.array([10., 10., 40., 40.]), '7', None)
    figure = side_by_side([str(tmp_path / 'image.png')], [[Panel('ground truth', [box]), Panel('nothing found', [])]])
    figure.savefig(tmp_path / 'picture.png')
    picture = cv2.imread(str(tmp_path / 'picture.png'))
    left, right = np.array_split(picture, 2, axis=1)
    green = np.array([44, 160, 44])
    assert (np.abs(left.astype(int) - green).sum(axis=2) < 30).sum() > 100
    assert (np.abs(right.astype(int) - green).sum(axis=2) < 30).sum() == 0


def test_side_by_side_has_a_title_above_every_panel(tmp_path):
    cv2.imwrite(str(tmp_path / 'image.png'), np.full((64, 64, 3), 255, np.uint8))
    box = (np.array([10., 10., 40., 30.]), '7', .5)
    figure = side_by_side([str(tmp_path / 'image.png')] * 2, [[Panel('a', [box]), Panel('b', [])],
                                                              [Panel('c', []), Panel('d', [box])]])
    assert [axes.get_title() for axes in figure.axes] == ['a', 'b', 'c', 'd']
    assert [len(axes.patches) for axes in figure.axes] == [1, 0, 0, 1]
    assert figure.axes[0].texts[0].get_text() == '7 0.50'


def test_side_by_side_keeps_labels_inside_of_the_image(tmp_path):
    cv2.imwrite(str(tmp_path / 'image.png'), np.full((100, 100, 3), 255, np.uint8))
    boxes = [(np.array([10., top, 40., 60.]), '7', None) for top in (1., 50.)]
    figure = side_by_side([str(tmp_path / 'image.png')], [[Panel('ground truth', boxes)]])
    assert [text.get_va() for text in figure.axes[0].texts] == ['top', 'bottom']
