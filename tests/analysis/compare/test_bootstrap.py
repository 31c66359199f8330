"""AP of resampled images against pycocotools, and the interval of a difference of AP."""
import json

import numpy as np
import pytest

from rl_mmdet.analysis.compare import bootstrap
from rl_mmdet.analysis.compare.bootstrap import average_precision, paired_interval, resampled_precision
from rl_mmdet.analysis.compare.coco_scores import score_detections

CLASSES = ('cat', 'dog', 'absent')
IMAGES = 12


def boxes(random, count):
    return np.hstack([random.integers(0, 150, (count, 2)), random.integers(10, 60, (count, 2))]).astype(float)


def annotated(random):
    """Annotations of 12 images, with crowds, without a 'dog' in the last 9 and without anything in the first."""
    annotations = []
    for index, box in enumerate(boxes(random, 50)):
        image = int(random.integers(1, IMAGES))
        annotations.append(dict(id=index + 1, image_id=image, category_id=1 + int(image < 3 and index % 2),
                                bbox=box.tolist(), area=box[2] * box[3], iscrowd=int(random.random() < 0.2)))
    return annotations


def detected(random, annotations, noise):
    """Detections with scores that are the same only between images."""
    near = [dict(each, bbox=(np.array(each['bbox']) + random.normal(0, noise, 4)).tolist())
            for each in annotations for _ in range(2)]
    false = [dict(image_id=int(random.integers(IMAGES)), category_id=int(random.integers(1, 4)), bbox=box.tolist())
             for box in boxes(random, 60)]
    ranks = {image: iter(random.permutation(200)) for image in range(IMAGES)}
    return [dict(image_id=each['image_id'], category_id=each['category_id'], bbox=each['bbox'],
                 score=float(next(ranks[each['image_id']])) / 200) for each in near + false]


def scored(folder, annotations, entries, images=range(IMAGES)):
    """The scores on ``images``, which may name one more than once; each time it is an image of its own."""
    def repeated(items):
        return [dict(item, id=number + 1, image_id=new)
                for number, (new, item) in enumerate((new, item) for new, old in enumerate(images)
                                                     for item in items if item['image_id'] == old)]

    data = dict(images=[dict(id=new, width=210, height=210) for new in range(len(images))],
                categories=[dict(id=index + 1, name=name) for index, name in enumerate(CLASSES)],
                annotations=repeated(annotations))
    (folder / 'annotations.json').write_text(json.dumps(data))
    (folder / 'detections.json').write_text(json.dumps(repeated(entries)))
    return score_detections(folder / 'annotations.json', folder / 'detections.json', 'bbox', CLASSES)


def test_average_precision_of_a_resample_is_that_of_pycocotools_on_repeated_images(tmp_path, monkeypatch):
    random = np.random.default_rng(5)
    annotations = annotated(random)
    entries = detected(random, annotations, 4)
    scores, matches = scored(tmp_path, annotations, entries)
    assert matches.ignored.any() and 0.05 < scores.ap < 0.95
    every = np.ones((1, IMAGES), dtype=int)
    assert average_precision(matches, every) == pytest.approx([scores.ap], abs=1e-9)
    draws = [np.sort(random.integers(IMAGES, size=IMAGES)) for _ in range(8)] + [np.full(IMAGES, IMAGES - 1)]
    expected = [scored(tmp_path, annotations, entries, images)[0].ap for images in draws]
    counts = np.array([np.bincount(images, minlength=IMAGES) for images in draws])
    assert (counts @ matches.objects == 0).sum() > len(draws)  # 'dog' is missing from some, not only 'absent'
    assert average_precision(matches, counts) == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr(bootstrap, 'CHUNK_BYTES', 1)
    assert average_precision(matches, counts) == pytest.approx(expected, abs=1e-6)
    assert np.isnan(average_precision(matches, np.eye(IMAGES, dtype=int)[:1])).all()  # draws no object
    assert average_precision(scored(tmp_path, annotations, [])[1], every).tolist() == [0]


@pytest.fixture(scope='module')
def detectors(tmp_path_factory):
    """Matches of two runs of a good detector and of two of a bad one."""
    random = np.random.default_rng(6)
    annotations = annotated(random)
    return [[scored(tmp_path_factory.mktemp('run'), annotations, detected(random, annotations, noise))[1]
             for _ in range(2)] for noise in (1, 6)]


def interval(reference, other, **settings):
    return paired_interval(*([resampled_precision(run, **settings) for run in side] for side in (reference, other)))


def test_interval_of_a_worse_detector_lies_below_zero_and_of_equally_good_ones_holds_zero(detectors):
    good, bad = detectors
    low, high = interval(good, bad, resamples=200)
    every = np.ones((1, IMAGES), dtype=int)
    aps = [np.mean([average_precision(run, every)[0] for run in runs]) for runs in detectors]
    assert low < aps[1] - aps[0] < high < 0
    assert interval(bad, good, resamples=200) == pytest.approx((-high, -low))
    low, high = interval(good[:1], good[1:], resamples=200)
    assert low < 0 < high


def test_interval_depends_on_the_seed_only_and_draws_the_same_images_for_both_sides(detectors):
    good, bad = detectors
    first = interval(good, bad, resamples=50, seed=1)
    assert interval(good, bad, resamples=50, seed=1) == first != interval(good, bad, resamples=50, seed=2)
    assert interval(good, good, resamples=50) == (0, 0)
