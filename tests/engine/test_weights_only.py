"""Files that torch.save has written, read without running code from them."""
import os
import pickle
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub

from rl_mmdet.engine.weights_only import load_weights_only


class Calls:
    """What is called with which arguments when this is unpickled."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


def test_what_mmengine_writes_comes_back(tmp_path):
    hub = MessageHub('test')
    hub.update_scalar('train/loss', 2.)
    hub.update_info('best', np.float32(3))
    meta = dict(cfg=ConfigDict(a=dict(b=[1])), found=np.arange(3), who={'me'}, kind=torch.uint8, raw=b'abc',
                steps=Counter([8, 11]))
    torch.save(dict(message_hub=hub.state_dict(), meta=meta, low=torch.ones(2, dtype=torch.bfloat16)),
               tmp_path / 'file.pth')
    read = load_weights_only(str(tmp_path / 'file.pth'))
    assert read['message_hub']['log_scalars']['train/loss'].current() == 2
    assert read['message_hub']['runtime_info']['best'] == 3
    assert read['meta'].pop('found').tolist() == meta.pop('found').tolist()
    assert read['meta'] == meta
    assert read['low'].dtype == torch.bfloat16


@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_a_file_may_come_from_either_major_version_of_numpy(tmp_path, module):
    scalar = np.float64(3).__reduce__()[0]
    torch.save(dict(best=np.float64(3)), tmp_path / 'own.pth')
    with zipfile.ZipFile(tmp_path / 'own.pth') as own, zipfile.ZipFile(tmp_path / 'file.pth', 'w') as other:
        for name in own.namelist():
            content = own.read(name)
            other.writestr(name, content.replace(f'c{scalar.__module__}\n'.encode(), f'c{module}\n'.encode()))
    assert load_weights_only(str(tmp_path / 'file.pth')) == dict(best=3)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(('call', 'name'), [
    ((os.system, ('touch ran',)), 'system'), ((getattr, (HistoryBuffer, '__init__')), 'getattr')],
    ids=['function', 'attribute'])
def test_nothing_else_is_found(tmp_path, monkeypatch, zipped, call, name):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(meta=Calls(*call)), 'file.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match=name):
        load_weights_only('file.pth')
    assert not os.path.exists('ran')


def test_torchscript_and_tar_archives_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / 'script.pt')
    with tarfile.open(tmp_path / 'tensors.tar', 'w') as archive:
        archive.add(tmp_path / 'script.pt', 'storages')
    for name, kind in (('script.pt', 'TorchScript'), ('tensors.tar', 'tar')):
        with pytest.raises(pickle.UnpicklingError, match=f'a {kind} archive'):
            load_weights_only(str(tmp_path / name))
