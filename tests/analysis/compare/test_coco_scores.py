"""COCO scores of dumped detections against pycocotools and MMDetection's CocoMetric."""
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rl_mmdet.analysis.compare.coco_scores import METRICS, score_detections

CLASSES = ('cat', 'absent', 'dog')
CATEGORIES = dict(cat=2, absent=3, dog=9)
SIZE = 200
AREAS = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large')


def random_boxes(random, count):
    """(count, 4) x, y, width, height inside the image, of all of COCO's sizes."""
    sides = random.choice([12, 50, 130], size=(count, 1)) + random.integers(0, 10, size=(count, 2))
    return np.hstack([random.integers(0, SIZE - sides), sides]).astype(float)


def mask_of(box):
    x, y, width, height = np.round(box).astype(int)
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order='F')
    mask[max(y, 0):y + height, max(x, 0):x + width] = 1
    return mask


def rle(box):
    code = masks.encode(mask_of(box))
    return dict(size=code['size'], counts=code['counts'].decode())


@pytest.fixture(scope='module')
def scored(tmp_path_factory):
    """Annotations, dumped detections by metric, and CocoMetric's own numbers.

    The data have crowds, images and classes without objects, equal scores, and 150 detections of a class in an image.
    """
    folder, random = tmp_path_factory.mktemp('scored'), np.random.default_rng(3)
    boxes = random_boxes(random, 60)
    names, images = random.choice(['cat', 'dog'], 60), random.integers(1, 10, 60)
    annotations = [dict(id=index + 1, image_id=int(image), category_id=CATEGORIES[name], bbox=box.tolist(),
                        area=box[2] * box[3], iscrowd=int(random.random() < 0.2), segmentation=rle(box))
                   for index, (box, name, image) in enumerate(zip(boxes, names, images, strict=True))]
    data = dict(images=[dict(id=index, width=SIZE, height=SIZE, file_name='') for index in range(10)],
                categories=[dict(id=number, name=name) for name, number in CATEGORIES.items()],
                annotations=annotations)
    (folder / 'annotations.json').write_text(json.dumps(data))
    metric = CocoMetric(str(folder / 'annotations.json'), metric=list(METRICS),
                        outfile_prefix=str(folder / 'detections'))
    metric.dataset_meta = dict(classes=CLASSES)
    for image in range(10):
        near = np.repeat(boxes[images == image], 2, axis=0)
        found = np.vstack([near + random.normal(0, 3, near.shape), random_boxes(random, 150 if image == 4 else 9)])
        labels = np.array([CLASSES.index(name) for name in names[images == image]], dtype=int).repeat(2)
        labels = np.append(labels, random.choice([0] if image == 4 else [0, 1, 2], len(found) - len(near)))
        predicted = dict(bboxes=torch.tensor(np.hstack([found[:, :2], found[:, :2] + found[:, 2:]])),
                         scores=torch.tensor(random.random(len(found)).round(1)), labels=torch.tensor(labels),
                         masks=torch.tensor(np.array([mask_of(box) for box in found])))
        metric.process({}, [dict(pred_instances=predicted, img_id=image, ori_shape=(SIZE, SIZE))])
    return folder, metric.compute_metrics(metric.results)


def score(folder, metric='bbox', classes=CLASSES):
    return score_detections(folder / 'annotations.json', folder / f'detections.{metric}.json', metric, classes)


@pytest.fixture
def changed(scored, tmp_path):
    """The scores after ``change`` was made to the list of detections."""
    def after(change, metric='bbox'):
        entries = json.loads((scored[0] / 'detections.bbox.json').read_text())
        (tmp_path / 'changed.json').write_text(json.dumps(change(entries)))
        return score_detections(scored[0] / 'annotations.json', tmp_path / 'changed.json', metric, CLASSES)
    return after


@pytest.mark.parametrize('metric', METRICS)
def test_scores_are_those_of_pycocotools_and_mmdet(scored, metric, capsys):
    folder, expected = scored
    scores = asdict(score(folder, metric)[0])
    assert capsys.readouterr().out == ''
    found = [scores[name] for name in AREAS]
    truth = COCO(str(folder / 'annotations.json'))
    entries = json.loads((folder / f'detections.{metric}.json').read_text())
    if metric == 'segm':
        entries = [{key: value for key, value in entry.items() if key != 'bbox'} for entry in entries]
    evaluation = COCOeval(truth, truth.loadRes(entries), metric)
    evaluation.params.maxDets = [100, 300, 1000]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert found == evaluation.stats[:6].tolist()
    assert [round(each, 3) for each in found] == [
        expected[f'{metric}_mAP{suffix}'] for suffix in ('', '_50', '_75', '_s', '_m', '_l')]
    assert 0.05 < scores['ap'] < 0.95


def test_classes_are_in_the_order_that_is_asked_for(scored):
    scores, matches = score(scored[0])
    turned, turned_matches = score(scored[0], classes=CLASSES[::-1])
    assert turned == scores
    assert np.array_equal(turned_matches.objects, matches.objects[:, ::-1])


def test_no_detections_score_zero_with_a_note(changed):
    scores, matches = changed(lambda entries: [])
    assert [getattr(scores, name) for name in AREAS] == [0] * 6
    assert scores.notes == ('no detections: all AP are 0',)
    assert matches.hit.shape == (10, 0) and matches.objects.sum() > 0


@pytest.mark.parametrize('broken', [dict(score=float('nan')), dict(bbox=[float('nan'), 0, 10, 10])])
def test_detections_that_are_not_numbers_are_left_out_with_a_note(scored, changed, broken):
    scores, _ = changed(lambda entries: [*entries, entries[0] | broken])
    assert scores.ap == score(scored[0])[0].ap
    assert scores.notes[0].startswith('1 of ') and 'not finite' in scores.notes[0]


def test_matches_have_at_most_100_detections_and_no_crowd_among_the_objects(scored):
    crowds = [each['iscrowd'] for each in json.loads((scored[0] / 'annotations.json').read_text())['annotations']]
    scores, matches = score(scored[0])
    assert np.count_nonzero((matches.image == 4) & (matches.label == 0)) == 100
    assert matches.objects.sum() == scores.objects == len(crowds) - sum(crowds) < len(crowds)
    assert scores.images == 10
    assert matches.ignored.any()


def test_what_cannot_be_scored_is_refused(scored, changed):
    with pytest.raises(ValueError, match=r"classes \['cow'\] are not among"):
        score(scored[0], 'bbox', ('cat', 'cow'))
    with pytest.raises(ValueError, match="metric 'segm' needs detections with a segmentation"):
        changed(lambda entries: entries, 'segm')
