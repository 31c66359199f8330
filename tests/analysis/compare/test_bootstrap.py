"""AP of resampled images against pycocotools, and the interval of a difference of AP."""
import json
from dataclasses import replace

import numpy as np
import pytest

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
    entries = []
    for each in annotations:
        for _ in range(2):
            box = np.array(each['bbox']) + random.normal(0, noise, 4)
            entries.append(dict(image_id=each['image_id'], category_id=each['category_id'], bbox=box.tolist()))
    for box in boxes(random, 60):
        entries.append(dict(image_id=int(random.integers(IMAGES)), category_id=int(random.integers(1, 4)),
                            bbox=box.tolist()))
    ranks = {image: iter(random.permutation(200)) for image in range(IMAGES)}
    return [dict(entry, score=float(next(ranks[entry['image_id']])) / 200) for entry in entries]


def scored(folder, annotations, entries, images):
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


@pytest.fixture
def data():
    random = np.random.default_rng(5)
    annotations = annotated(random)
    return annotations, detected(random, annotations, 4)


@pytest.fixture
def detectors(tmp_path):
    """Matches of two runs of a good detector and of two of a bad one."""
    random = np.random.default_rng(6)
    annotations = annotated(random)
    return [[scored(tmp_path, annotations, detected(random, annotations, noise), range(IMAGES))[1] for _ in range(2)]
            for noise in (1, 6)]


def interval(reference, other, level=0.95, **settings):
    """The interval for matches, each run of them resampled."""
    return paired_interval(*([resampled_precision(run, **settings) for run in side] for side in (reference, other)),
                           level=level)


def test_average_precision_is_that_of_pycocotools(data, tmp_path):
    scores, matches = scored(tmp_path, *data, range(IMAGES))
    assert matches.ignored.any() and 0.05 < scores.ap < 0.95
    assert average_precision(matches) == pytest.approx([scores.ap], abs=1e-9)
    assert average_precision(matches, np.ones((2, IMAGES))) == pytest.approx([scores.ap] * 2, abs=1e-9)


def test_average_precision_of_a_resample_is_that_of_pycocotools_on_repeated_images(data, tmp_path):
    _, matches = scored(tmp_path, *data, range(IMAGES))
    random = np.random.default_rng(0)
    draws = [np.sort(random.integers(IMAGES, size=IMAGES)) for _ in range(8)] + [np.full(IMAGES, IMAGES - 1)]
    expected = [scored(tmp_path, *data, images)[0].ap for images in draws]
    counts = np.array([np.bincount(images, minlength=IMAGES) for images in draws])
    assert (counts @ matches.objects == 0).sum() > len(draws)  # 'dog' is missing from some, not only 'absent'
    assert average_precision(matches, counts) == pytest.approx(expected, abs=1e-6)


def test_average_precision_in_chunks_is_that_in_one_go(data, tmp_path, monkeypatch):
    _, matches = scored(tmp_path, *data, range(IMAGES))
    counts = np.random.default_rng(0).integers(0, 3, size=(20, IMAGES))
    whole = average_precision(matches, counts)
    monkeypatch.setattr('rl_mmdet.analysis.compare.bootstrap.CHUNK_BYTES', 1)
    assert average_precision(matches, counts) == pytest.approx(whole, abs=1e-12)


def test_average_precision_without_detections_is_zero(data, tmp_path):
    _, matches = scored(tmp_path, data[0], [], range(IMAGES))
    assert average_precision(matches).tolist() == [0]


def test_average_precision_without_objects_is_nan(data, tmp_path):
    _, matches = scored(tmp_path, *data, range(IMAGES))
    assert np.isnan(average_precision(matches, np.eye(IMAGES, dtype=int)[:1])).tolist() == [True]


def test_average_precision_refuses_counts_of_another_number_of_images(data, tmp_path):
    _, matches = scored(tmp_path, *data, range(IMAGES))
    with pytest.raises(ValueError, match=r'counts must have shape \(B, 12\).*got \(2, 3\)'):
        average_precision(matches, np.ones((2, 3)))


def test_difference_is_that_of_the_mean_ap_of_the_runs(detectors):
    good, bad = ([average_precision(run)[0] for run in runs] for runs in detectors)
    assert interval(*detectors, resamples=10).difference == pytest.approx(np.mean(bad) - np.mean(good))


def test_interval_of_equal_runs_is_zero(detectors):
    found = interval(detectors[0], detectors[0], resamples=50)
    assert (found.difference, found.low, found.high) == (0, 0, 0)


def test_interval_of_equally_good_runs_holds_zero(detectors):
    found = interval(detectors[0][:1], detectors[0][1:], resamples=200)
    assert found.low < 0 < found.high


def test_interval_of_a_worse_detector_lies_below_zero(detectors):
    found = interval(*detectors, resamples=200)
    assert found.low < found.difference < found.high < 0


def test_interval_of_swapped_sides_has_the_other_sign(detectors):
    found, swapped = interval(*detectors, resamples=100), interval(*detectors[::-1], resamples=100)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))
    assert swapped.difference == -found.difference


def test_interval_is_narrower_than_that_of_unpaired_draws(detectors):
    random = np.random.default_rng(1)
    good = detectors[0][0]
    alike = replace(good, hit=good.hit & (random.random(good.hit.shape[1]) < 0.9))
    first, second = (average_precision(run, random.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), 300))
                     for run in (good, alike))
    low, high = np.nanquantile(second - first, [0.025, 0.975])
    found = interval([good], [alike], resamples=300, level=0.95)
    assert found.high - found.low < 0.8 * (high - low)


def test_interval_names_its_settings(detectors):
    found = interval(*detectors, resamples=30, level=0.9)
    assert (found.resamples, found.level) == (30, 0.9)


def test_interval_depends_on_the_seed_only(detectors):
    first = interval(*detectors, resamples=50, seed=1)
    assert interval(*detectors, resamples=50, seed=1) == first
    assert interval(*detectors, resamples=50, seed=2) != first


def test_interval_of_a_higher_level_is_wider(detectors):
    wide, narrow = (interval(*detectors, resamples=200, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_other_images_are_refused(detectors):
    (run, _), _ = detectors
    other = replace(run, objects=run.objects[::-1])
    with pytest.raises(ValueError, match=r'other\[1\] is of other images or classes'):
        interval([run], [run, other])


@pytest.mark.parametrize('settings', [dict(seed=1), dict(resamples=20)])
def test_other_draws_are_refused(detectors, settings):
    run, _ = detectors[0]
    with pytest.raises(ValueError, match=r'other\[0\] is of other draws'):
        paired_interval([resampled_precision(run, 10)], [resampled_precision(run, **dict(resamples=10) | settings)])


def test_resampled_precision_begins_with_the_images_as_they_are(detectors):
    run, _ = detectors[0]
    found = resampled_precision(run, 5).precision
    assert found.shape == (6,)
    assert found[0] == pytest.approx(average_precision(run)[0])


@pytest.mark.parametrize('sides', [(0, 1), (1, 0)])
def test_side_without_runs_is_refused(detectors, sides):
    with pytest.raises(ValueError, match='has no runs'):
        interval(*(runs[:count] for runs, count in zip(detectors, sides, strict=True)))


def test_images_without_objects_are_refused(detectors):
    (run, _), _ = detectors
    empty = replace(run, objects=np.zeros_like(run.objects))
    with pytest.raises(ValueError, match='no object to find'):
        interval([empty], [empty])


@pytest.mark.parametrize('wrong', [dict(resamples=0), dict(level=1.0), dict(level=0.0)])
def test_settings_out_of_range_are_refused(detectors, wrong):
    with pytest.raises(ValueError, match='|'.join(f'{name} must' for name in wrong)):
        interval(*detectors, **wrong)
