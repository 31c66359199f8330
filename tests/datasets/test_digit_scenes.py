"""The digit scenes on disk: what is written, what is reused, and what is made again."""
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import pytest

from rl_mmdet.datasets import digit_scenes
from rl_mmdet.datasets.digit_scenes import generate_digit_scenes

SIZE = (128, 96)


def generate(root, split='train', num_images=4, **settings):
    return Path(generate_digit_scenes(root, split, num_images, **{'image_size': SIZE, **settings}))


def contents(root):
    """Bytes of every file below a folder, but for lock files."""
    files = [path for path in sorted(root.rglob('*')) if path.is_file() and path.suffix != '.lock']
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


def test_scenes_are_in_coco_layout_and_reused(root, monkeypatch):
    monkeypatch.setattr(digit_scenes, 'draw_scene', lambda *args: pytest.fail('drawn again'))
    before = contents(root)
    path = generate(root)
    coco = json.loads(path.read_text())
    assert path == root / 'annotations' / 'instances_train.json'
    for number, image in enumerate(coco['images']):
        assert image == dict(id=number, file_name=f'{number:06d}.png', width=SIZE[0], height=SIZE[1])
        assert cv2.imread(str(root / 'train' / image['file_name'])).shape == (SIZE[1], SIZE[0], 3)
    assert [annotation['id'] for annotation in coco['annotations']] == list(range(1, len(coco['annotations']) + 1))
    assert coco['categories'] == [{'id': d + 1, 'name': str(d)} for d in range(10)]
    assert contents(root) == before


def test_the_same_arguments_give_the_same_bytes_and_fewer_images_the_first_ones(finished, tmp_path):
    generate(tmp_path / 'same')
    assert contents(tmp_path / 'same') == contents(finished)
    paths = generate(tmp_path / 'few', num_images=2), generate(finished)
    few, many = (json.loads(path.read_text()) for path in paths)
    assert few['annotations'] == [a for a in many['annotations'] if a['image_id'] < 2]
    assert contents(tmp_path / 'few')['train/000001.png'] == contents(finished)['train/000001.png']
    generate(tmp_path / 'other', seed=1)
    assert contents(tmp_path / 'other')['train/000000.png'] != contents(finished)['train/000000.png']


@pytest.mark.parametrize('damage', [
    lambda root: (root / 'train/000002.png').unlink(),
    lambda root: shutil.rmtree(root / 'train'),
    lambda root: (root / 'annotations/instances_train.json').unlink(),
    lambda root: (root / 'annotations/digit_scenes_train.json').write_text('{"settings": "of an older version"}'),
], ids=['image deleted', 'images deleted', 'annotations deleted', 'settings changed'])
def test_an_incomplete_split_is_made_again(root, finished, damage):
    damage(root)
    generate(root)
    assert contents(root) == contents(finished)


@pytest.mark.parametrize('there', [True, False], ids=['over another split', 'from scratch'])
@pytest.mark.parametrize(('owner', 'name'), [(digit_scenes, '_write_png'), (Path, 'rename')], ids=['drawing', 'moving'])
def test_an_interrupted_split_is_made_again(root, finished, tmp_path, monkeypatch, owner, name, there):
    folder = root if there else tmp_path / 'new'
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(folder, num_images=6, seed=5)
    generate(folder)
    assert contents(folder) == contents(finished)


def test_other_settings_make_it_again_and_leave_the_other_split_alone(root, tmp_path, caplog):
    generate(root, 'val', num_images=2)
    val = {name: content for name, content in contents(root).items() if 'val' in name}
    generate(root, num_images=2, seed=3)
    (message,) = caplog.messages
    assert '"num_images": 2' in message and '"num_images": 4' in message
    generate(tmp_path / 'fresh', num_images=2, seed=3)
    assert contents(root) == contents(tmp_path / 'fresh') | val


@pytest.mark.parametrize('name', ['annotations/instances_train.json', 'train/photo.jpg'])
def test_foreign_files_are_refused_and_untouched(tmp_path, name):
    foreign = tmp_path / name
    foreign.parent.mkdir()
    foreign.write_bytes(b'precious')
    with pytest.raises(FileExistsError, match=r'train(\.json)? was not made by .*Choose another root'):
        generate(tmp_path)
    assert contents(tmp_path) == {name: b'precious'}


def test_at_the_same_time_one_draws_and_shows_its_progress(tmp_path, finished, capsys):
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(generate, [tmp_path] * 3))
    assert len(set(paths)) == 1
    assert contents(tmp_path) == contents(finished)
    assert capsys.readouterr().err.count('digit scenes train: 100%') == 1


@pytest.mark.parametrize(('wrong', 'message'), [
    ({'split': 'test'}, r"split='test': unknown; choose one of \('train', 'val'\)"),
    ({'num_images': 0}, 'num_images must be an integer of at least 1, got 0'),
    ({'seed': True}, 'seed must be an integer of at least 0, got True'),
    ({'image_size': 128}, r'image_size=128: expected two integers \(width, height\)'),
    ({'image_size': (128, 63)}, 'image_size must be an integer of at least 64, got 63'),
])
def test_a_wrong_argument_raises_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / 'digits', **wrong)
    assert list(tmp_path.iterdir()) == []
