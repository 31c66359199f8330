"""Refusing checkpoints that don't fit."""
import pytest
import torch
from mmdet.models.backbones import ResNet, SwinTransformer
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from rl_mmdet.engine import UserError, load_checkpoint_
from rl_mmdet.models import RLResNet, RLSwin

TINY = dict(depth=50, base_channels=4, stem_channels=4)
REPLACED = dict(TINY, replacement=dict(plan=dict(type='EveryKth', k=2)))
PLUGIN = dict(cfg=dict(type='ContextBlock', ratio=.5), position='after_conv3', stages=(False, False, True, False))


HEAD = dict(num_classes=2, in_channels=144, feat_channels=4, norm_cfg=None)
DETECTORS = {
    'ATSS': dict(type='ATSS', bbox_head=dict(HEAD, type='ATSSHead', anchor_generator=dict(
        type='AnchorGenerator', ratios=[1.], octave_base_scale=8, scales_per_octave=1, strides=[4]))),
    'FCOS': dict(type='FCOS', bbox_head=dict(HEAD, type='FCOSHead', strides=[4], regress_ranges=((-1, 64),))),
}


def detector(kind, **backbone):
    """A detector of MMDetection's with this backbone."""
    init_default_scope('mmdet')
    return MODELS.build(dict(DETECTORS[kind], backbone=dict(backbone, out_indices=(3,)), neck=None))


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
    report = load_checkpoint_(RLResNet(**REPLACED), save(ResNet(**TINY).state_dict() | {'fc.weight': torch.zeros(2)}))
    assert report.initialised == ['layer1.1', 'layer2.1', 'layer3.1', 'layer3.3', 'layer4.1']
    assert report.left_over == ['fc.weight']
    assert not report.missing
    assert len(str(report).splitlines()) == 4


def test_a_backbone_is_found_below_its_prefix(save):
    state = ResNet(**TINY).state_dict()
    path = save(dict(state_dict={f'module.backbone.{key}': value for key, value in state.items()}))
    assert not load_checkpoint_(RLResNet(**REPLACED), path, prefix='backbone').missing
    with pytest.raises(UserError, match="no tensor below 'backbone'"):
        load_checkpoint_(RLResNet(**REPLACED), save(state), prefix='backbone')


@pytest.mark.parametrize(('saved', 'model', 'complaint'), [
    ((ResNet, dict(TINY, depth=101)), (RLResNet, REPLACED), 'layer3.6.* has no place'),
    ((ResNet, dict(TINY, base_channels=8, stem_channels=8)), (RLResNet, REPLACED), 'has shape'),
    ((ResNet, dict(TINY, deep_stem=True)), (RLResNet, REPLACED), 'conv1.weight is missing'),
], ids=['deeper', 'wider', 'another stem'])
def test_what_does_not_fit_is_refused_with_its_keys(save, saved, model, complaint):
    (saved, settings), (model, own) = saved, model
    with pytest.raises(UserError, match=complaint):
        load_checkpoint_(model(**own), save(saved(**settings).state_dict()))


@pytest.mark.parametrize(('there', 'here', 'differences'), [
    (replaced(k=2), replaced(k=4), ['layer3.3 is replaced there and kept here']),
    (replaced(k=4), replaced(k=2), ['layer3.3 is kept there and replaced here']),
    (replaced(k=3), replaced(k=3, offset=2), ['layer2.1 is replaced there and kept here', ' and 2 more. ']),
    (replaced(k=4), replaced(k=4, operator=SLIM), ['layer2.1 has coeff there and coeff and scale here']),
    (replaced(k=4, operator=SLIM), replaced(k=4), ['layer2.1 has coeff and scale there and coeff here']),
    (replaced(k=4), replaced(k=4, operator=dict(type='Skip')), ['layer2.1 has coeff there and nothing here']),
    (replaced(k=4, fusion=dict(type='TransformFusion', rank=1)),
     replaced(k=4, fusion=dict(type='TransformFusion', rank=2)),
     ['layer2.1.down has shape (', ', 1) there and (', ', 2) here']),
    (replaced(k=4), TINY, ['layer2.1 is replaced there and kept here', 'tools/materialize.py']),
    (replaced(k=4, operator=SLIM), TINY, ['layer2.1 is replaced there and kept here']),
], ids=['more', 'fewer', 'others', 'lighter', 'not light', 'left out', 'fusion', 'none', 'none, light'])
def test_a_checkpoint_of_another_replacement_is_refused_with_the_difference(save, there, here, differences):
    path = save(RLResNet(**there).state_dict())
    with pytest.raises(UserError, match='saved from a model with another replacement: ') as caught:
        load_checkpoint_(RLResNet(**here), path)
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
        assert load_checkpoint_(RLResNet(**own), path).missing == []
        return
    with pytest.raises(UserError, match=f'another replacement: {complaint}'):
        load_checkpoint_(RLResNet(**own), path)


def test_a_block_may_differ_where_its_keys_are_ignored(save):
    path = save(RLResNet(**replaced(k=4)).state_dict())
    assert 'layer3.3' in load_checkpoint_(RLResNet(**replaced(k=2)), path, ignore=[r'^layer3\.3']).initialised


def test_mmdets_swin_is_not_given_its_own_layout_to_convert(save):
    tiny = dict(embed_dims=12, num_heads=(1, 1, 1, 1))
    path = save(SwinTransformer(**tiny).state_dict())
    load_checkpoint_(SwinTransformer(**tiny), path)
    load_checkpoint_(RLSwin(**tiny, convert_weights=True), path)
    with pytest.raises(UserError, match="doesn't read its own layout with convert_weights=True"):
        load_checkpoint_(SwinTransformer(**tiny, convert_weights=True), path)


def test_ignored_keys_may_be_missing(save):
    state = ResNet(**TINY).state_dict()
    del state['conv1.weight']
    path = save(state)
    with pytest.raises(UserError, match='--ignore-keys'):
        load_checkpoint_(RLResNet(**REPLACED), path)
    assert load_checkpoint_(RLResNet(**REPLACED), path, ignore=['^conv1']).missing == ['conv1.weight']


def test_dcn_offsets_and_plugins_may_be_missing(save):
    model = RLResNet(**REPLACED, dcn=dict(type='DCNv2', deform_groups=1), plugins=[PLUGIN],
                     stage_with_dcn=(False, False, False, True))
    missing = load_checkpoint_(model, save(ResNet(**TINY).state_dict())).missing
    assert any('conv_offset' in key for key in missing)
    assert any('context_block' in key for key in missing)


def test_a_detector_with_a_teacher_and_a_student_starts_from_a_plain_one(save):
    plain = detector('ATSS', type='ResNet', **TINY)
    both = MODELS.build(dict(type='SemiBaseDetector', detector=dict(
        DETECTORS['ATSS'], neck=None, backbone=dict(REPLACED, type='RLResNet', out_indices=(3,))),
        semi_train_cfg=dict(freeze_teacher=True)))
    path = save(plain.state_dict())
    report = load_checkpoint_(both, path)
    assert (len(report.initialised), report.missing, report.left_over) == (10, [], [])
    for part in (both.teacher, both.student):
        assert torch.equal(part.bbox_head.atss_cls.weight, plain.bbox_head.atss_cls.weight)
    with pytest.raises(UserError, match=r'student\.backbone\.layer2\.0\.conv1\.weight is missing'):
        load_checkpoint_(both, save({key: value for key, value in plain.state_dict().items() if 'layer2.0' not in key}))


def test_a_head_may_rename_keys_of_earlier_versions(save):
    model = detector('FCOS', type='ResNet', **TINY)
    old = {key.replace('conv_cls', 'fcos_cls').replace('conv_reg', 'fcos_reg'): torch.full_like(value, 2)
           for key, value in model.state_dict().items()}
    assert not load_checkpoint_(model, save(old)).left_over
    assert (model.bbox_head.conv_cls.weight == 2).all()


def test_buffers_that_a_model_does_not_save_may_be_left_over(save):
    model = detector('FCOS', type='ResNet', **TINY)
    model.data_preprocessor.register_buffer('mean', torch.zeros(3, 1, 1), persistent=False)
    state = model.state_dict() | {'data_preprocessor.mean': torch.ones(3, 1, 1)}
    load_checkpoint_(model, save(state))
    with pytest.raises(UserError, match=r'data_preprocessor\.other has no place'):
        load_checkpoint_(model, save(state | {'data_preprocessor.other': torch.ones(3)}))


def test_of_a_file_of_another_model_the_line_says_what_its_keys_are(save):
    path = save({f'encoder.{key}': value for key, value in ResNet(**TINY).state_dict().items()})
    with pytest.raises(UserError, match=r"none of its 3\d\d tensors is .* begin with encoder, .*prefix="):
        load_checkpoint_(RLResNet(**REPLACED), path)
