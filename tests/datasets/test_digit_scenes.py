"""The digit scenes on disk: what is written, what is trusted, and what is made again."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import pytest

from rl_mmdet.datasets import digit_scenes
from rl_mmdet.datasets.digit_scenes import generate_digit_scenes

SIZE = (128, 96)
SCALES = (12, 40)


def generate(root, split='train', num_images=4, **settings):
    settings = {'image_size': SIZE, 'scales': SCALES, **settings}
    return Path(generate_digit_scenes(root, split, num_images, **settings))


def contents(root):
    """Bytes of every file below a folder."""
    files = [path for path in sorted(root.rglob('*')) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp('digits')
    generate(root)
    return root


@pytest.fixture
def root(finished, tmp_path):
    """A copy of a finished train split that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / 'digits'))


@pytest.fixture
def made(monkeypatch):
    """Counts how often a split is drawn."""
    calls = []
    make = digit_scenes._Store.make
    monkeypatch.setattr(digit_scenes._Store, 'make',
                        lambda store, settings: (calls.append(store.split), make(store, settings)))
    return calls


def test_generate_returns_annotation_file_and_lists_every_image(finished):
    path = generate(finished)
    coco = json.loads(path.read_text())
    assert path == finished / 'annotations' / 'instances_train.json'
    assert [image['file_name'] for image in coco['images']] == [f'{i:06d}.png' for i in range(4)]
    for image in coco['images']:
        pixels = cv2.imread(str(finished / 'train' / image['file_name']), cv2.IMREAD_UNCHANGED)
        assert pixels.shape == (SIZE[1], SIZE[0], 3)
        assert (image['width'], image['height']) == SIZE
    assert coco['categories'] == [{'id': d + 1, 'name': str(d)} for d in range(10)]


def test_generate_same_arguments_gives_same_bytes(finished, tmp_path):
    generate(tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_generate_other_seed_gives_other_scenes(finished, tmp_path):
    generate(tmp_path, seed=1)
    assert contents(tmp_path)['train/000000.png'] != contents(finished)['train/000000.png']


def test_generate_fewer_images_is_a_prefix(finished, tmp_path):
    few = json.loads(generate(tmp_path, num_images=2).read_text())
    many = json.loads(generate(finished).read_text())
    assert few['images'] == many['images'][:2]
    assert few['annotations'] == [a for a in many['annotations'] if a['image_id'] < 2]
    for name in ('000000.png', '000001.png'):
        assert (tmp_path / 'train' / name).read_bytes() == (finished / 'train' / name).read_bytes()


def test_generate_finished_split_is_reused(root, made):
    before = contents(root)
    generate(root)
    assert made == []
    assert contents(root) == before


@pytest.mark.parametrize('damage', [
    lambda root: (root / 'train/000002.png').unlink(),
    lambda root: (root / 'train/000001.png').write_bytes(b'\x89PNG'),
    lambda root: (root / 'annotations/instances_train.json').unlink(),
    lambda root: (root / 'annotations/instances_train.json').write_text('{}'),
], ids=['image deleted', 'image truncated', 'annotations deleted', 'annotations changed'])
def test_generate_damaged_split_is_made_again(root, finished, made, damage):
    damage(root)
    generate(root)
    assert made == ['train']
    assert contents(root) == contents(finished)


def test_generate_interrupted_is_made_again(finished, tmp_path, monkeypatch):
    draw_scene = digit_scenes.draw_scene

    def interrupted(settings, split, index, *args):
        if index == 2:
            raise KeyboardInterrupt
        return draw_scene(settings, split, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(digit_scenes, 'draw_scene', interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path)
    assert not (tmp_path / 'annotations' / 'instances_train.json').exists()
    generate(tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_generate_interrupted_then_fewer_images_leaves_none_of_the_old(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(digit_scenes, '_write_png', lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(root, num_images=1, seed=5)
    (root / 'train' / '000003.png').write_bytes(b'left from the first time')
    generate(root, num_images=2)
    assert sorted(p.name for p in (root / 'train').iterdir()) == ['000000.png', '000001.png']


def test_generate_other_settings_regenerates_and_says_what_changed(root, made, tmp_path, caplog):
    generate(root, num_images=2, seed=3)
    assert made == ['train']
    (message,) = caplog.messages
    assert 'num_images 4 -> 2' in message and 'seed 0 -> 3' in message
    assert 'scales' not in message
    generate(tmp_path / 'fresh', num_images=2, seed=3)
    assert contents(root) == contents(tmp_path / 'fresh')


def test_generate_val_leaves_train_alone(root):
    before = contents(root)
    generate(root, 'val', num_images=2)
    after = contents(root)
    assert before == {name: after[name] for name in before}


@pytest.mark.parametrize('name', ['annotations/instances_train.json', 'train/photo.jpg'])
def test_generate_foreign_files_are_refused_and_untouched(tmp_path, name):
    foreign = tmp_path / name
    foreign.parent.mkdir()
    foreign.write_bytes(b'precious')
    with pytest.raises(FileExistsError, match=f'{foreign.name}.*Choose another root'):
        generate(tmp_path)
    assert contents(tmp_path) == {name: b'precious'}


def test_generate_foreign_image_among_ours_is_not_overwritten(root):
    (root / 'train' / '000004.png').write_bytes(b'precious')
    with pytest.raises(FileExistsError, match=r'000004\.png'):
        generate(root, num_images=8)
    assert (root / 'train' / '000004.png').read_bytes() == b'precious'


def test_generate_unreadable_record_is_refused(root):
    (root / 'annotations' / 'digit_scenes_train.json').write_text('[]')
    with pytest.raises(FileExistsError, match='not a record of digit scenes'):
        generate(root)


def test_generate_at_the_same_time_draws_once(tmp_path, finished, made):
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(generate, [tmp_path] * 3))
    assert made == ['train']
    assert len(set(paths)) == 1
    assert contents(tmp_path) == contents(finished)


def test_generate_shows_progress_only_when_it_draws(tmp_path, capsys):
    generate(tmp_path, num_images=1)
    assert 'digit scenes train' in capsys.readouterr().err
    generate(tmp_path, num_images=1)
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize(('wrong', 'message'), [
    ({'split': 'test'}, r"split='test': unknown; choose one of \('train', 'val'\)"),
    ({'num_images': 0}, 'num_images=0: expected an integer >= 1'),
    ({'num_images': True}, 'num_images=True'),
    ({'seed': -1}, 'seed=-1'),
    ({'image_size': (128, 32)}, 'image_size=32: expected an integer >= 64'),
    ({'image_size': 128}, r'image_size=128: expected two integers \(width, height\)'),
    ({'scales': (40, 12)}, 'lower bound exceeds the upper'),
    ({'scales': (4, 12)}, 'scales=4: expected an integer >= 8'),
    ({'scales': (16, 90)}, 'lower the upper scale to 75'),
    ({'digits_per_image': (0, 2)}, 'digits_per_image=0'),
    ({'clutter': (1.5, 2)}, 'clutter=1.5'),
    ({'max_overlap': 1}, r'max_overlap=1: expected a number in \[0, 1\)'),
])
def test_generate_wrong_argument_raises_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / 'digits', **wrong)
    assert list(tmp_path.iterdir()) == []
