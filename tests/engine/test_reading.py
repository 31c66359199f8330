"""Files with weights: none runs code unless the user allows it, however it is read; each form is understood."""
import gzip
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import load_checkpoint
from safetensors.torch import save_file
from torch import nn

from rl_mmdet.engine import UserError, build_model, read_checkpoint, safe_reading
from rl_mmdet.models.timm_models import read_timm_weights

URL = 'http://nowhere.invalid/weights.pth'
HEAD = dict(type='ATSSHead', num_classes=2, in_channels=4, feat_channels=4, norm_cfg=None, anchor_generator=dict(
    type='AnchorGenerator', ratios=[1.], octave_base_scale=8, scales_per_octave=1, strides=[4]))
PARTS = dict(backbone=dict(type='ResNet', depth=18, base_channels=4, num_stages=1, strides=(1,),
                           dilations=(1,), out_indices=(0,)), neck=None,
             bbox_head=HEAD)


def build_student(path):
    """A detector that loads its teacher from ``path`` while it is built."""
    teacher = Config(dict(model=dict(PARTS, type='ATSS')))
    return build_model(Config(dict(model=dict(PARTS, type='KnowledgeDistillationSingleStageDetector',
                                              teacher_config=teacher, teacher_ckpt=path))))


def by_mmengine(path):
    with safe_reading():
        load_checkpoint(nn.Linear(1, 1), path)


def by_timm(path):
    with safe_reading():
        read_timm_weights(path)


def by_another(path):
    """As any code may read a file, for instance a user's hook."""
    with safe_reading():
        torch.load(path, weights_only=False) if '://' not in path else torch.hub.load_state_dict_from_url(path)


class Code:
    """Something that only pickle can bring back."""


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A checkpoint's path, which is also where a file fetched from URL is kept."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    return tmp_path / 'checkpoints' / 'weights.pth'


@pytest.mark.parametrize(('read', 'url'), [
    (read_checkpoint, False), (read_checkpoint, True), (build_student, False), (build_student, True),
    (by_mmengine, False), (by_mmengine, True), (by_timm, False), (by_another, False), (by_another, True)])
def test_reading_runs_no_code(path, tmp_path, read, url):
    torch.save(dict(state_dict=dict(a=Bomb(str(tmp_path / 'ran')))), path)
    with pytest.raises(UserError, match=r'run code \(.*open\).*--allow-pickle'):
        read(URL if url else str(path))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('source', [URL, None])
def test_what_needs_code_is_read_where_that_is_allowed(path, source):
    torch.save(dict(state_dict={}, meta=Code()), path)
    assert isinstance(read_checkpoint(source or str(path), allow_pickle=True)['meta'], Code)
    with pytest.raises(UserError, match='--allow-pickle'):
        read_checkpoint(source or str(path))


def test_an_attribute_of_anything_but_a_log_buffer_needs_code(path):
    class Reach:
        def __reduce__(self):
            return getattr, (np.ndarray, '__class__')
    buffer = HistoryBuffer([1.], [1])
    torch.save(dict(state_dict={}, message_hub=dict(loss=buffer), number=np.float64(2)), path)
    read = read_checkpoint(str(path))
    assert read['message_hub']['loss'].mean() == 1 and read['number'] == 2
    torch.save(dict(state_dict=dict(a=Reach())), path)
    with pytest.raises(UserError, match='run code'):
        read_checkpoint(str(path))


def test_outside_of_the_tools_torch_reads_as_ever(path):
    before = torch.load
    with pytest.raises(ZeroDivisionError), safe_reading():
        assert torch.load is not before
        raise ZeroDivisionError
    assert torch.load is before


def zipped(file):
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('weights.pth', b'')


def packed(file):
    with tarfile.open(file, 'w') as archive:
        archive.addfile(tarfile.TarInfo('weights.pth'))


@pytest.mark.parametrize(('write', 'what'), [
    (lambda file: file.write_bytes(b''), 'it is empty'),
    (lambda file: file.write_text('hello world'), 'not a PyTorch checkpoint'),
    (lambda file: file.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(600)), 'not a PyTorch checkpoint'),
    (lambda file: file.write_text('\n<!DOCTYPE html><html>404</html>'), 'it is a web page'),
    (lambda file: file.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:00\n'), 'git lfs pull'),
    (lambda file: file.write_bytes(gzip.compress(b'0' * 999)), 'a tar or gzip archive'),
    (packed, 'a tar or gzip archive'),
    (zipped, 'a zip archive of 1 files'),
    (lambda file: torch.jit.script(nn.Linear(1, 1)).save(str(file)), r'a TorchScript program.*state_dict\(\)'),
    (lambda file: file.mkdir(), 'it is a folder'),
    (lambda file: torch.save([torch.ones(1)], file), 'holds a list, not a state dict'),
    (lambda file: torch.save({'a\x1b[31m': torch.ones(1)}, file), r"called 'a\\x1b\[31m'"),
])
def test_what_is_no_checkpoint_is_refused_by_what_it_is(path, write, what):
    write(path)
    with pytest.raises(UserError, match=what) as caught:
        read_checkpoint(str(path))
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize('options', [{}, dict(_use_new_zipfile_serialization=False)], ids=['zip', 'before torch 1.6'])
def test_a_truncated_file_is_refused(path, options):
    torch.save(nn.Linear(9, 9).state_dict(), path, **options)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(UserError, match='truncated'):
        read_checkpoint(str(path))


@pytest.mark.parametrize(('form', 'write'), [
    (lambda tensors: dict(state_dict=tensors), torch.save),
    (lambda tensors: dict(model={f'module.{key}': value for key, value in tensors.items()}, epoch=1), torch.save),
    (lambda tensors: dict(state_dict={f'_orig_mod.module.{key}': value for key, value in tensors.items()}), torch.save),
    (lambda tensors: dict(state_dict_ema=tensors, state_dict={}), torch.save),
    (lambda tensors: tensors, lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False)),
    (lambda tensors: tensors, save_file),
], ids=['MMEngine', 'DDP', 'compiled', 'EMA', 'before torch 1.6', 'safetensors'])
def test_mmengine_loads_weights_in_the_forms_that_people_have(path, form, write):
    given, model = nn.Linear(2, 2), nn.Linear(2, 2)
    write(form(given.state_dict()), path)
    with safe_reading():
        load_checkpoint(model, str(path), strict=True)
    assert torch.equal(model.weight, given.weight)
