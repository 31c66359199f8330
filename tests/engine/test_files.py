"""Files that are there as a whole or not at all."""
import pytest

from rl_mmdet.engine import UserError
from rl_mmdet.engine.files import check_new_file, written_whole


def test_a_file_is_replaced_when_it_is_complete_and_not_after_an_error(tmp_path):
    path = tmp_path / 'file.txt'
    path.write_text('old')
    with pytest.raises(ZeroDivisionError), written_whole(str(path)) as file:
        file.write_text('ne')
        1 / 0  # noqa: B018
    assert path.read_text() == 'old'
    with written_whole(path) as file:
        file.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new'
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"file\.bin: can't be written \(No space left on device\)"), \
            written_whole(tmp_path / 'file.bin') as file:
        file.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_needs_a_folder(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='there is no folder .*nowhere; make it'):
        check_new_file(str(tmp_path / 'nowhere' / 'file'))
    monkeypatch.setattr('os.access', lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="can't be written to"):
        check_new_file(str(tmp_path / 'file'))


def test_whatever_is_in_the_place_of_a_new_file_is_named(tmp_path):
    (tmp_path / 'link').symlink_to('nowhere')
    with pytest.raises(UserError, match='link: exists already; name another file'):
        check_new_file(str(tmp_path / 'link'))
    check_new_file(str(tmp_path / 'free'))
