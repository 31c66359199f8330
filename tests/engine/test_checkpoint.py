"""Reading checkpoints without running their code, and refusing what doesn't fit."""
import pickle
from pathlib import Path

import pytest
import torch
from mmdet.models.backbones import ResNet

from rl_mmdet.engine import UserError, check_checkpoint, read_checkpoint
from rl_mmdet.models import RLResNet

TINY = dict(depth=50, base_channels=4, stem_channels=4)
REPLACED = dict(TINY, replacement=dict(plan=dict(type='EveryKth', k=2)))


class Code:
    """Something that only pickle can bring back."""


def save(tmp_path, state, name='weights.pth'):
    torch.save(state, tmp_path / name)
    return str(tmp_path / name)


def test_read_checkpoint_missing_file(tmp_path):
    with pytest.raises(UserError, match='no such checkpoint file'):
        read_checkpoint(str(tmp_path / 'nothing.pth'))


def test_read_checkpoint_truncated_file(tmp_path):
    path = Path(save(tmp_path, ResNet(**TINY).state_dict()))
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match='truncated'):
        read_checkpoint(str(path))


@pytest.mark.parametrize('content', [b'', b'hello world, this is a text file', b'\x89PNG\r\n\x1a\n' + bytes(100)])
def test_read_checkpoint_foreign_file(tmp_path, content):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(UserError, match='not a PyTorch checkpoint'):
        read_checkpoint(str(path))


def test_read_checkpoint_that_needs_code_is_refused_with_the_flag(tmp_path):
    path = save(tmp_path, dict(state_dict={}, meta=Code()))
    with pytest.raises(UserError, match='--allow-pickle'):
        read_checkpoint(path)


def test_read_checkpoint_that_needs_code_is_read_when_allowed(tmp_path):
    path = save(tmp_path, dict(state_dict={}, meta=Code()))
    assert isinstance(read_checkpoint(path, allow_pickle=True)['meta'], Code)


def test_read_checkpoint_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')
    path = tmp_path / 'weights.pth'
    path.write_bytes(pickle.dumps(dict(a=Bomb())))
    with pytest.raises(UserError):
        read_checkpoint(str(path))
    assert not (tmp_path / 'ran').exists()


def test_check_checkpoint_baseline_initialises_computing_layers(tmp_path):
    path = save(tmp_path, ResNet(**TINY).state_dict() | {'fc.weight': torch.zeros(2, 2)})
    report = check_checkpoint(RLResNet(**REPLACED), path)
    assert sorted(report.fits) == ['layer1.1', 'layer2.1', 'layer3.1', 'layer3.3', 'layer4.1']
    assert report.left_over == ['fc.weight']
    assert not report.missing
    assert len(str(report).splitlines()) == 4


def test_check_checkpoint_below_a_prefix(tmp_path):
    path = save(tmp_path, dict(state_dict={f'module.backbone.{k}': v for k, v in ResNet(**TINY).state_dict().items()}))
    assert not check_checkpoint(RLResNet(**REPLACED), path, prefix='backbone').missing


@pytest.mark.parametrize(('other', 'complaint'), [
    (dict(TINY, depth=101), 'layer3.6.* has no place'),
    (dict(TINY, base_channels=8, stem_channels=8), 'has shape'),
    (dict(TINY, deep_stem=True), 'conv1.weight is missing'),
])
def test_check_checkpoint_another_architecture_names_the_first_keys(tmp_path, other, complaint):
    path = save(tmp_path, ResNet(**other).state_dict())
    with pytest.raises(UserError, match=complaint):
        check_checkpoint(RLResNet(**REPLACED), path)


def test_check_checkpoint_of_a_replaced_model_says_to_materialize(tmp_path):
    path = save(tmp_path, RLResNet(**REPLACED).state_dict())
    with pytest.raises(UserError, match='materialize'):
        check_checkpoint(ResNet(**TINY), path)


def test_check_checkpoint_ignored_keys_may_be_missing(tmp_path):
    state = ResNet(**TINY).state_dict()
    del state['conv1.weight']
    path = save(tmp_path, state)
    with pytest.raises(UserError, match='--ignore-keys'):
        check_checkpoint(RLResNet(**REPLACED), path)
    assert check_checkpoint(RLResNet(**REPLACED), path, ignore=['^conv1']).missing == ['conv1.weight']


def test_check_checkpoint_dcn_offsets_and_plugins_may_be_missing(tmp_path):
    path = save(tmp_path, ResNet(**TINY).state_dict())
    model = RLResNet(**REPLACED, dcn=dict(type='DCNv2', deform_groups=1),
                     stage_with_dcn=(False, False, False, True),
                     plugins=[dict(cfg=dict(type='ContextBlock', ratio=.5), position='after_conv3',
                                   stages=(False, False, True, False))])
    assert any('conv_offset' in key for key in check_checkpoint(model, path).missing)


def test_check_checkpoint_without_tensors_below_the_prefix(tmp_path):
    path = save(tmp_path, ResNet(**TINY).state_dict())
    with pytest.raises(UserError, match="no tensor below 'backbone'"):
        check_checkpoint(RLResNet(**REPLACED), path, prefix='backbone')
