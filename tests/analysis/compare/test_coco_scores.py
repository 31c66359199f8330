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

from rl_mmdet.analysis.compare.coco_scores import METRICS, Matches, score_detections

CLASSES = ('cat', 'absent', 'dog')
CATEGORIES = dict(cat=2, absent=3, dog=9)
SIZE = 200
AREAS = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large')


def random_boxes(random, count):
    """(count, 4) x, y, width, height inside the image, of all of COCO's sizes."""
    sides = random.choice([12, 50, 130], size=(count, 1)) + random.integers(0, 10, size=(count, 2))
    return np.hstack([random.integers(0, SIZE - sides), sides]).astype(float)


def encoded(box):
    x, y, width, height = np.round(box).astype(int)
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order='F')
    mask[max(y, 0):y + height, max(x, 0):x + width] = 1
    return mask


def rle(box):
    code = masks.encode(encoded(box))
    return dict(size=code['size'], counts=code['counts'].decode())


def annotated(boxes, names, images, crowds):
    """A COCO data set of 10 images."""
    annotations = [dict(id=index + 1, image_id=int(image), category_id=CATEGORIES[name], bbox=box.tolist(),
                        area=box[2] * box[3], iscrowd=int(crowd), segmentation=rle(box))
                   for index, (box, name, image, crowd) in enumerate(zip(boxes, names, images, crowds, strict=True))]
    return dict(images=[dict(id=index, width=SIZE, height=SIZE, file_name='') for index in range(10)],
                categories=[dict(id=number, name=name) for name, number in CATEGORIES.items()],
                annotations=annotations)


@pytest.fixture(scope='module')
def scored(tmp_path_factory):
    """Annotations, dumped detections by metric, and CocoMetric's own numbers.

    The data have crowds, images and classes without objects, equal scores, and 150 detections of a class in an image.
    """
    folder, random = tmp_path_factory.mktemp('scored'), np.random.default_rng(3)
    boxes = random_boxes(random, 60)
    names, images = random.choice(['cat', 'dog'], 60), random.integers(1, 10, 60)
    data = annotated(boxes, names, images, random.random(60) < 0.2)
    (folder / 'annotations.json').write_text(json.dumps(data))
    metric = CocoMetric(str(folder / 'annotations.json'), metric=list(METRICS), classwise=True,
                        outfile_prefix=str(folder / 'detections'))
    metric.dataset_meta = dict(classes=CLASSES)
    for image in range(10):
        near = np.repeat(boxes[images == image], 2, axis=0)
        found = np.vstack([near + random.normal(0, 3, near.shape), random_boxes(random, 150 if image == 4 else 9)])
        labels = np.array([CLASSES.index(name) for name in names[images == image]], dtype=int).repeat(2)
        labels = np.append(labels, random.choice([0] if image == 4 else [0, 1, 2], len(found) - len(near)))
        predicted = dict(bboxes=torch.tensor(np.hstack([found[:, :2], found[:, :2] + found[:, 2:]])),
                         scores=torch.tensor(random.random(len(found)).round(1)), labels=torch.tensor(labels),
                         masks=torch.tensor(np.array([encoded(box) for box in found])))
        metric.process({}, [dict(pred_instances=predicted, img_id=image, ori_shape=(SIZE, SIZE))])
    return folder, metric.compute_metrics(metric.results)


def score(folder, metric, classes=CLASSES):
    return score_detections(folder / 'annotations.json', folder / f'detections.{metric}.json', metric, classes)


def with_detections(tmp_path, scored, change, metric='bbox'):
    """The scores after ``change`` was made to the list of detections."""
    folder, _ = scored
    entries = json.loads((folder / f'detections.{metric}.json').read_text())
    (tmp_path / 'changed.json').write_text(json.dumps(change(entries)))
    return score_detections(folder / 'annotations.json', tmp_path / 'changed.json', metric, CLASSES)


@pytest.mark.parametrize('metric', METRICS)
def test_scores_are_those_of_pycocotools(scored, metric):
    folder, _ = scored
    truth = COCO(str(folder / 'annotations.json'))
    entries = json.loads((folder / f'detections.{metric}.json').read_text())
    if metric == 'segm':
        entries = [{key: value for key, value in entry.items() if key != 'bbox'} for entry in entries]
    evaluation = COCOeval(truth, truth.loadRes(entries), metric)
    evaluation.params.maxDets = [100, 300, 1000]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    found = asdict(score(folder, metric)[0])
    assert [found[name] for name in AREAS] == evaluation.stats[:6].tolist()
    assert 0.05 < found['ap'] < 0.95


@pytest.mark.parametrize('metric', METRICS)
def test_scores_are_those_of_mmdets_metric(scored, metric):
    folder, expected = scored
    found = asdict(score(folder, metric)[0])
    assert [round(found[name], 3) for name in AREAS] == [
        expected[f'{metric}_mAP{suffix}'] for suffix in ('', '_50', '_75', '_s', '_m', '_l')]


def test_class_scores_are_those_of_mmdets_metric(scored):
    folder, expected = scored
    per_class = score(folder, 'segm')[0].per_class  # of both metrics mmdet keeps the classes of the last
    assert list(per_class) == list(CLASSES)
    assert [round(per_class[name], 3) for name in ('cat', 'dog')] == [
        float(expected[f'{name}_precision']) for name in ('cat', 'dog')]


def test_class_without_objects_has_no_score(scored):
    folder, expected = scored
    assert np.isnan(expected['absent_precision'])
    assert score(folder, 'bbox')[0].per_class['absent'] is None


def test_class_scores_follow_the_order_that_is_asked_for(scored):
    folder, _ = scored
    scores, matches = score(folder, 'bbox')
    turned, turned_matches = score(folder, 'bbox', CLASSES[::-1])
    assert list(turned.per_class) == list(CLASSES[::-1])
    assert turned.per_class == scores.per_class
    assert np.array_equal(turned_matches.objects, matches.objects[:, ::-1])


def test_pycocotools_is_silent(scored, capsys):
    score(scored[0], 'bbox')
    assert capsys.readouterr().out == ''


def test_no_detections_score_zero_with_a_note(scored, tmp_path):
    scores, matches = with_detections(tmp_path, scored, lambda entries: [])
    assert [getattr(scores, name) for name in AREAS] == [0] * 6
    assert scores.per_class == dict(cat=0, absent=None, dog=0)
    assert scores.notes == ('no detections: all AP are 0',)
    assert matches.hit.shape == (10, 0) and matches.objects.sum() > 0


@pytest.mark.parametrize('change', [dict(score=float('nan')), dict(bbox=[float('nan')] * 4)])
def test_detections_that_are_not_numbers_score_zero_with_a_note(scored, tmp_path, change):
    scores, _ = with_detections(tmp_path, scored, lambda entries: [{**entry, **change} for entry in entries])
    assert scores.ap == 0
    assert 'not finite' in scores.notes[0] and 'no detections' in scores.notes[1]


def test_a_detection_that_is_not_a_number_leaves_the_others_their_score(scored, tmp_path):
    broken = dict(image_id=1, category_id=2, score=0.9, bbox=[float('nan'), 0, 10, 10])
    scores, _ = with_detections(tmp_path, scored, lambda entries: [*entries, broken])
    assert scores.ap == score(scored[0], 'bbox')[0].ap
    assert scores.notes[0].startswith('1 of ')


def test_size_without_objects_has_no_score(scored, tmp_path):
    folder, _ = scored
    data = json.loads((folder / 'annotations.json').read_text())
    data['annotations'] = [each for each in data['annotations'] if each['area'] < 96 ** 2]
    (tmp_path / 'annotations.json').write_text(json.dumps(data))
    scores, _ = score_detections(tmp_path / 'annotations.json', folder / 'detections.bbox.json', 'bbox', CLASSES)
    assert scores.ap_large is None
    assert scores.ap_small > 0 and scores.ap_medium > 0


def test_matches_keep_at_most_100_detections_of_an_image_and_class(scored):
    _, matches = score(scored[0], 'bbox')
    assert np.count_nonzero((matches.image == 4) & (matches.label == 0)) == 100


def test_matches_count_no_crowd_as_object(scored):
    folder, _ = scored
    crowds = [each['iscrowd'] for each in json.loads((folder / 'annotations.json').read_text())['annotations']]
    _, matches = score(folder, 'bbox')
    assert sum(crowds) > 0
    assert matches.objects.sum() == len(crowds) - sum(crowds)
    assert matches.ignored.any()


def test_matches_come_back_from_their_file(scored, tmp_path):
    _, matches = score(scored[0], 'segm')
    matches.save(tmp_path / 'matches.npz')
    again = Matches.load(tmp_path / 'matches.npz')
    assert [path.name for path in tmp_path.iterdir()] == ['matches.npz']
    for name, array in vars(matches).items():
        assert np.array_equal(getattr(again, name), array) and getattr(again, name).dtype == array.dtype


def test_unknown_metric_is_refused(scored):
    with pytest.raises(ValueError, match=r"metric must be one of \('bbox', 'segm'\), got 'proposal'"):
        score_detections(scored[0] / 'annotations.json', scored[0] / 'detections.bbox.json', 'proposal', CLASSES)


def test_unknown_class_is_refused(scored):
    with pytest.raises(ValueError, match=r"classes \['cow'\] are not among"):
        score(scored[0], 'bbox', ('cat', 'cow'))


def test_detections_on_other_images_are_refused(scored, tmp_path):
    with pytest.raises(ValueError, match='image_id 77'):
        with_detections(tmp_path, scored, lambda entries: [{**entries[0], 'image_id': 77}])


def test_segm_of_boxes_is_refused(scored):
    with pytest.raises(ValueError, match='.segm.json'):
        score_detections(scored[0] / 'annotations.json', scored[0] / 'detections.bbox.json', 'segm', CLASSES)
