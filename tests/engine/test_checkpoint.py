"""Reading checkpoints without running their code, and refusing what doesn't fit."""
import pickle

import pytest
import torch
from mmdet.models.backbones import ResNet

from rl_mmdet.engine import UserError, check_checkpoint, read_checkpoint
from rl_mmdet.models import RLResNet

TINY = dict(depth=50, base_channels=4, stem_channels=4)
REPLACED = dict(TINY, replacement=dict(plan=dict(type='EveryKth', k=2)))
PLUGIN = dict(cfg=dict(type='ContextBlock', ratio=.5), position='after_conv3', stages=(False, False, True, False))


class Code:
    """Something that only pickle can bring back."""


@pytest.fixture
def save(tmp_path):
    """Write a checkpoint; returns its path."""
    def write(state):
        torch.save(state, tmp_path / 'weights.pth')
        return str(tmp_path / 'weights.pth')
    return write


def test_what_is_no_checkpoint_is_refused(save, tmp_path):
    path = tmp_path / 'weights.pth'
    with pytest.raises(UserError, match='no such checkpoint file'):
        read_checkpoint(str(path))
    save(ResNet(**TINY).state_dict())
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(UserError, match='truncated'):
        read_checkpoint(str(path))
    for content in (b'', b'hello world, this is a text file', b'\x89PNG\r\n\x1a\n' + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(UserError, match='not a PyTorch checkpoint'):
            read_checkpoint(str(path))


def test_what_needs_code_is_read_only_when_allowed(save):
    path = save(dict(state_dict={}, meta=Code()))
    with pytest.raises(UserError, match='--allow-pickle'):
        read_checkpoint(path)
    assert isinstance(read_checkpoint(path, allow_pickle=True)['meta'], Code)


def test_reading_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')
    (tmp_path / 'weights.pth').write_bytes(pickle.dumps(dict(a=Bomb())))
    with pytest.raises(UserError):
        read_checkpoint(str(tmp_path / 'weights.pth'))
    assert not (tmp_path / 'ran').exists()


def test_a_baseline_initialises_computing_layers(save):
    report = check_checkpoint(RLResNet(**REPLACED), save(ResNet(**TINY).state_dict() | {'fc.weight': torch.zeros(2)}))
    assert sorted(report.fits) == ['layer1.1', 'layer2.1', 'layer3.1', 'layer3.3', 'layer4.1']
    assert report.left_over == ['fc.weight']
    assert not report.missing
    assert len(str(report).splitlines()) == 4


def test_a_backbone_is_found_below_its_prefix(save):
    state = ResNet(**TINY).state_dict()
    path = save(dict(state_dict={f'module.backbone.{key}': value for key, value in state.items()}))
    assert not check_checkpoint(RLResNet(**REPLACED), path, prefix='backbone').missing
    with pytest.raises(UserError, match="no tensor below 'backbone'"):
        check_checkpoint(RLResNet(**REPLACED), save(state), prefix='backbone')


@pytest.mark.parametrize(('saved', 'model', 'complaint'), [
    ((ResNet, dict(TINY, depth=101)), (RLResNet, REPLACED), 'layer3.6.* has no place'),
    ((ResNet, dict(TINY, base_channels=8, stem_channels=8)), (RLResNet, REPLACED), 'has shape'),
    ((ResNet, dict(TINY, deep_stem=True)), (RLResNet, REPLACED), 'conv1.weight is missing'),
    ((RLResNet, REPLACED), (ResNet, TINY), 'materialize'),
], ids=['deeper', 'wider', 'another stem', 'replaced'])
def test_what_does_not_fit_is_refused_with_its_keys(save, saved, model, complaint):
    (saved, settings), (model, own) = saved, model
    with pytest.raises(UserError, match=complaint):
        check_checkpoint(model(**own), save(saved(**settings).state_dict()))


def test_ignored_keys_may_be_missing(save):
    state = ResNet(**TINY).state_dict()
    del state['conv1.weight']
    path = save(state)
    with pytest.raises(UserError, match='--ignore-keys'):
        check_checkpoint(RLResNet(**REPLACED), path)
    assert check_checkpoint(RLResNet(**REPLACED), path, ignore=['^conv1']).missing == ['conv1.weight']


def test_dcn_offsets_and_plugins_may_be_missing(save):
    model = RLResNet(**REPLACED, dcn=dict(type='DCNv2', deform_groups=1), plugins=[PLUGIN],
                     stage_with_dcn=(False, False, False, True))
    missing = check_checkpoint(model, save(ResNet(**TINY).state_dict())).missing
    assert any('conv_offset' in key for key in missing)
    assert any('context_block' in key for key in missing)
