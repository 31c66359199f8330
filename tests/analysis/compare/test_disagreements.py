"""Which images are drawn, and what is drawn on them."""
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from rl_mmdet.analysis.compare import disagreements as module
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


def found(*images):
    """One object in each of four images, found in the given ones."""
    return make_matches([1, 1, 1, 1], [(image, .9, (1, 1), 0) for image in images])


def test_image_quality_is_the_mean_f1_over_the_thresholds():
    matches = make_matches([2, 1, 0, 0], [(0, .9, (1, 1), 0), (0, .8, (1, 0), 0), (0, .7, (0, 0), 0),
                                          (3, .9, (0, 0), 0)])
    expected = (2 * 2 / 5 + 2 * 1 / 5) / 2
    assert np.allclose(image_quality(matches), [expected, 0, 1, 0])


def test_image_quality_leaves_out_low_scores_and_what_is_matched_to_a_crowd():
    matches = make_matches([1], [(0, .9, (1, 1), 0), (0, .3, (0, 0), 0), (0, .8, (1, 1), 1)])
    assert image_quality(matches).tolist() == [1]


def test_largest_disagreements_name_the_variant_that_differs_most():
    base = found(0, 1)
    chosen = largest_disagreements({'same': (base, base), 'worse': (base, found(1)), 'mixed': (base, found(0, 1, 3))})
    assert [(each.image, each.variant, each.baseline_quality, each.variant_quality) for each in chosen] == [
        (0, 'worse', 1, 0), (3, 'mixed', 0, 1)]


def test_largest_disagreements_come_first_and_ties_by_image():
    base = make_matches([1, 2, 1, 1], [])
    other = make_matches([1, 2, 1, 1], [(1, .9, (1, 1), 0), (2, .9, (1, 1), 0), (3, .9, (1, 1), 0)])
    assert [each.image for each in largest_disagreements({'other': (base, other)}, count=2)] == [2, 3]


def test_largest_disagreements_without_variants_or_differences_are_none():
    assert largest_disagreements({}) == []
    assert largest_disagreements({'same': (found(0), found(0))}) == []


@pytest.fixture
def comparison(tmp_path, monkeypatch):
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
        make_matches([1, 1], [(1, .9, (1, 1), 0)] if right else []).save(run.folder / 'matches_bbox.npz')
        dump = [dict(image_id=7, category_id=5, bbox=[4, 5, 10, 20], score=.9 if right else .2)]
        (run.folder / 'detections.bbox.json').write_text(json.dumps(dump))
    monkeypatch.setattr(module, '_image_folder', lambda comparison: tmp_path / 'images')
    return SimpleNamespace(baseline='base', classes=['cat'], runs=lambda: runs,
                           annotations=lambda: tmp_path / 'annotations.json')


@pytest.fixture
def contents():
    runs = [SimpleNamespace(variant=name, seed=seed, status='finished' if seed or name == 'other' else 'failed')
            for seed in (0, 1) for name in ('base', 'other')]
    return SimpleNamespace(metrics=['bbox'], runs=runs,
                           variants=[SimpleNamespace(name='base'), SimpleNamespace(name='other')])


def test_disagreements_draw_truth_baseline_and_variant_on_images_ordered_by_id(comparison, contents):
    truth, base, other = disagreements(comparison, contents).axes
    assert [axes.get_title() for axes in (truth, base, other)] == ['ground truth', 'base (F1 0.00)', 'other (F1 1.00)']
    assert [(box.get_xy(), box.get_width(), box.get_height()) for box in truth.patches] == [((4, 5), 10, 20)]
    assert [text.get_text() for text in truth.texts] == ['cat']
    assert not base.patches
    assert [text.get_text() for text in other.texts] == ['cat 0.90']


def test_disagreements_are_of_the_lowest_seed_that_both_have_finished(comparison, contents):
    (pair,) = module._comparable_runs(comparison, contents).values()
    assert [(run.variant, run.seed) for run in pair] == [('base', 1), ('other', 1)]


def test_disagreements_without_image_files_are_none(comparison, contents, tmp_path):
    (tmp_path / 'images' / 'b.png').unlink()
    assert disagreements(comparison, contents) is None


def test_disagreements_before_two_trainings_are_finished_are_none(comparison, contents):
    contents.runs = contents.runs[:2]
    assert disagreements(comparison, contents) is None


COCO = dict(type='CocoDataset', data_root='data/coco', ann_file='val.json', data_prefix=dict(img='val/'), pipeline=[])


@pytest.mark.parametrize('dataset, folder', [
    (COCO, Path('data/coco/val')), (dict(type='ConcatDataset', datasets=[dict(COCO, lazy_init=True)] * 2), None)])
def test_image_folder_is_the_val_sets(dataset, folder):
    cfg = Config(dict(default_scope='mmdet', val_dataloader=dict(dataset=dataset)))
    assert module._image_folder(SimpleNamespace(baseline='base', config=lambda name: cfg)) == folder
