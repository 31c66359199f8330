"""Which images are drawn, and what is drawn on them."""
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from rl_mmdet.analysis.compare.coco_scores import Matches
from rl_mmdet.analysis.compare.comparison import Run
from rl_mmdet.analysis.compare.disagreements import disagreements, image_quality, largest_disagreements


def make_matches(objects, detections):
    """Matches at two thresholds: objects by image, and detections as (image, score, hit at each, ignored)."""
    image, score, hit, ignored = ([each[i] for each in detections] for i in range(4))
    count = len(detections)
    return Matches(np.array(image, dtype=int), np.zeros(count, int), np.array(score, dtype=float),
                   np.array(hit, dtype=bool).reshape(count, 2).T,
                   np.tile(np.array(ignored, dtype=bool), (2, 1)), np.array(objects)[:, None])


def test_image_quality_is_the_mean_f1_without_low_scores_and_crowds():
    matches = make_matches([2, 1, 0, 0, 1], [
        (0, .9, (1, 1), 0), (0, .8, (1, 0), 0), (0, .7, (0, 0), 0), (3, .9, (0, 0), 0),
        (4, .9, (1, 1), 0), (4, .3, (0, 0), 0), (4, .8, (1, 1), 1)])
    assert np.allclose(image_quality(matches), [(2 * 2 / 5 + 2 * 1 / 5) / 2, 0, 1, 0, 1])


def test_largest_disagreements_come_first_with_the_variant_that_differs_most_and_ties_by_image():
    baseline = np.array([[1, 1, 0, 0, .5]] * 2)
    variants = np.array([[0, 1, 0, 0, .5], [0, 1, .5, 1, .5]])
    assert largest_disagreements(baseline, variants) == [(0, 0), (3, 1), (2, 1)]
    assert largest_disagreements(baseline, variants, count=1) == [(0, 0)]


COCO = dict(type='CocoDataset', ann_file='annotations.json', data_prefix=dict(img='images/'), pipeline=[])


@pytest.fixture
def comparison(tmp_path):
    """Two seeds of a baseline and a variant on two images; the baseline has finished the second seed only."""
    (tmp_path / 'images').mkdir()
    for name in ('a.png', 'b.png'):
        cv2.imwrite(str(tmp_path / 'images' / name), np.full((40, 40, 3), 255, np.uint8))
    content = dict(images=[dict(id=7, file_name='b.png'), dict(id=3, file_name='a.png')],
                   categories=[dict(id=5, name='cat'), dict(id=6, name='left out')],
                   annotations=[dict(image_id=7, category_id=5, bbox=[4, 5, 10, 20], iscrowd=0),
                                dict(image_id=7, category_id=6, bbox=[1, 1, 2, 2]),
                                dict(image_id=3, category_id=5, bbox=[1, 1, 9, 9])])
    (tmp_path / 'annotations.json').write_text(json.dumps(content))
    runs = [Run(name, seed, tmp_path / name / str(seed)) for seed in (0, 1) for name in ('base', 'other')]
    for run in runs:
        run.folder.mkdir(parents=True)
        right = run.variant == 'other'
        if run.variant == 'other' or run.seed:
            make_matches([1, 1], [(1, .9, (1, 1), 0)] if right else []).save(run.folder / 'matches_bbox.npz')
        dump = [dict(image_id=7, category_id=5, bbox=[4, 5, 10, 20], score=.9 if right else .2)]
        (run.folder / 'detections.bbox.json').write_text(json.dumps(dump))
    cfg = Config(dict(val_dataloader=dict(dataset=dict(COCO, data_root=str(tmp_path)))))
    return SimpleNamespace(baseline='base', classes=['cat'], runs=lambda: runs, config=lambda name: cfg, cfg=cfg,
                           annotations=lambda: tmp_path / 'annotations.json')


@pytest.fixture
def contents():
    runs = [SimpleNamespace(variant=name, seed=seed, status='finished' if seed or name == 'other' else 'failed')
            for seed in (0, 1) for name in ('base', 'other')]
    return SimpleNamespace(metrics=['bbox'], runs=runs,
                           variants=[SimpleNamespace(name='base'), SimpleNamespace(name='other')])


def test_disagreements_draw_truth_baseline_and_variant_on_images_ordered_by_id(comparison, contents, tmp_path):
    figure = disagreements(comparison, contents)
    truth, base, other = figure.axes
    assert [axes.get_title() for axes in (truth, base, other)] == ['ground truth', 'base (F1 0.00)', 'other (F1 1.00)']
    assert [(box.get_xy(), box.get_width(), box.get_height()) for box in truth.patches] == [((4, 5), 10, 20)]
    assert [text.get_text() for text in truth.texts] == ['cat']
    assert not base.patches
    assert [text.get_text() for text in other.texts] == ['cat 0.90']
    figure.savefig(tmp_path / 'picture.png')
    left, _, right = np.array_split(cv2.imread(str(tmp_path / 'picture.png')).astype(int), 3, axis=1)
    for pixels, colour in ((left, [44, 160, 44]), (right, [40, 39, 214])):
        assert (np.abs(pixels - colour).sum(axis=2) < 30).sum() > 50


@pytest.mark.parametrize('missing', ['image', 'folder', 'run'])
def test_disagreements_without_image_files_or_a_pair_of_runs_are_none(comparison, contents, tmp_path, missing):
    if missing == 'image':
        (tmp_path / 'images' / 'b.png').unlink()
    elif missing == 'folder':
        one = dict(comparison.cfg.val_dataloader.dataset, lazy_init=True)
        comparison.cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[one] * 2)
    else:
        contents.runs = contents.runs[:2]
    assert disagreements(comparison, contents) is None
