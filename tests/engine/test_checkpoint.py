"""Refusing checkpoints that don't fit."""
import pytest
import torch
from mmdet.models.backbones import ResNet, SwinTransformer
from mmengine.config import Config

from rl_mmdet.engine import UserError, check_checkpoint
from rl_mmdet.models import RLResNet, RLSwin

TINY = dict(depth=50, base_channels=4, stem_channels=4)
REPLACED = dict(TINY, replacement=dict(plan=dict(type='EveryKth', k=2)))
PLUGIN = dict(cfg=dict(type='ContextBlock', ratio=.5), position='after_conv3', stages=(False, False, True, False))


SLIM = dict(type='SlimBlock')


def replaced(k, offset=1, **settings):
    """Arguments of a backbone that has left its first stage whole."""
    return dict(TINY, frozen_stages=1, replacement=dict(plan=dict(type='EveryKth', k=k, offset=offset), **settings))


@pytest.fixture
def save(tmp_path):
    """Write a checkpoint; returns its path."""
    def write(state):
        torch.save(state, tmp_path / 'weights.pth')
        return str(tmp_path / 'weights.pth')
    return write


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
], ids=['deeper', 'wider', 'another stem'])
def test_what_does_not_fit_is_refused_with_its_keys(save, saved, model, complaint):
    (saved, settings), (model, own) = saved, model
    with pytest.raises(UserError, match=complaint):
        check_checkpoint(model(**own), save(saved(**settings).state_dict()))


@pytest.mark.parametrize(('there', 'here', 'differences'), [
    (replaced(k=2), replaced(k=4), ['layer3.3 is replaced there and kept here']),
    (replaced(k=4), replaced(k=2), ['layer3.3 is kept there and replaced here']),
    (replaced(k=3), replaced(k=3, offset=2), ['layer2.1 is replaced there and kept here', ' and 2 more. ']),
    (replaced(k=4), replaced(k=4, operator=SLIM), ['layer2.1 has coeff there and coeff and scale here']),
    (replaced(k=4, operator=SLIM), replaced(k=4), ['layer2.1 has coeff and scale there and coeff here']),
    (replaced(k=4), replaced(k=4, operator=dict(type='Skip')), ['layer2.1 has coeff there and nothing here']),
    (replaced(k=4, operator=SLIM), replaced(k=4, operator=SLIM, fusion=dict(type='ChannelFusion')),
     ['layer2.1.coeff has shape (2,) there and (2, 34) here']),
    (replaced(k=4), TINY, ['layer2.1 is replaced there and kept here', 'tools/materialize.py']),
    (replaced(k=4, operator=SLIM), TINY, ['layer2.1 is replaced there and kept here']),
], ids=['more', 'fewer', 'others', 'lighter', 'not light', 'left out', 'fusion', 'none', 'none, light'])
def test_a_checkpoint_of_another_replacement_is_refused_with_the_difference(save, there, here, differences):
    path = save(RLResNet(**there).state_dict())
    with pytest.raises(UserError, match='saved from a model with another replacement: ') as caught:
        check_checkpoint(RLResNet(**here), path)
    assert all(text in str(caught.value) for text in differences)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('there', 'here', 'complaint'), [
    (dict(width=0.125), dict(width=0.25),
     r'the operator is SlimBlock\(width=0.125, scale=0.0\) there and SlimBlock\(width=0.25, scale=0.0\) here'),
    (dict(width=0.25), dict(width=0.25, scale=1.), None),
])
def test_settings_that_no_key_shows_are_compared_with_the_saved_config(save, there, here, complaint):
    saved, own = (replaced(k=4, operator=dict(SLIM, **settings)) for settings in (there, here))
    text = Config(dict(model=dict(backbone=dict(saved, type='RLResNet')))).pretty_text
    path = save(dict(meta=dict(cfg=text), state_dict=RLResNet(**saved).state_dict()))
    if complaint is None:
        assert check_checkpoint(RLResNet(**own), path).missing == []
        return
    with pytest.raises(UserError, match=f'another replacement: {complaint}'):
        check_checkpoint(RLResNet(**own), path)


def test_a_block_may_differ_where_its_keys_are_ignored(save):
    path = save(RLResNet(**replaced(k=4)).state_dict())
    assert 'layer3.3' in check_checkpoint(RLResNet(**replaced(k=2)), path, ignore=[r'^layer3\.3']).fits


def test_mmdets_swin_is_not_given_its_own_layout_to_convert(save):
    tiny = dict(embed_dims=12, num_heads=(1, 1, 1, 1))
    path = save(SwinTransformer(**tiny).state_dict())
    check_checkpoint(SwinTransformer(**tiny), path)
    check_checkpoint(RLSwin(**tiny, convert_weights=True), path)
    with pytest.raises(UserError, match="doesn't read its own layout with convert_weights=True"):
        check_checkpoint(SwinTransformer(**tiny, convert_weights=True), path)


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
