"""timm's models as backbones: maps, arguments, weights from files, and what is said when something is wrong."""
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from safetensors.torch import save_file
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rl_mmdet.engine import UserError, load_checkpoint_
from rl_mmdet.engine.preflight.model import check_distributed
from rl_mmdet.models import build_rl_backbone
from rl_mmdet.models.timm_models import read_timm_weights
from rl_mmdet.replacement import computing_layers
from rl_mmdet.replacement.saved_bytes import saved_bytes

EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2))
NAME = 'resnet50.a1_in1k'
TINY = dict(channels=(4, 4, 8, 8))
PLAIN = dict(embed_dim=24, depth=4, num_heads=2)


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    """Whoever tries to reach another machine fails."""
    def refuse(*_: Any) -> None:
        raise OSError('no network in tests')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """An empty folder for torch hub's checkpoints, and one for timm's own downloads."""
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    (tmp_path / 'hub' / 'checkpoints').mkdir(parents=True)
    return tmp_path / 'hub' / 'checkpoints'


@pytest.fixture
def download(monkeypatch) -> list[tuple]:
    """timm's two ways to fetch weights: both fail as without a network, and note what was asked for."""
    asked = []

    def fail(*args: Any, **_: Any) -> None:
        asked.append(args)
        raise ConnectionError('unreachable')
    monkeypatch.setattr('timm.models.load_state_dict_from_hf', fail)
    monkeypatch.setattr('torch.hub.load_state_dict_from_url', fail)
    return asked


@pytest.fixture
def weights(randomise_) -> dict[str, torch.Tensor]:
    return randomise_(timm.create_model('resnet50', **TINY)).state_dict()


# Feature maps and attributes

@pytest.mark.parametrize(('name', 'kwargs', 'count'), [
    ('resnet50', TINY, 5), ('convnext_atto', dict(dims=(4, 4, 8, 8), depths=(1, 1, 3, 1)), 4)])
def test_maps_are_those_of_timms_feature_extractor(name, kwargs, count, randomise_, image):
    model = randomise_(build_rl_backbone(timm=name, out_indices=range(count), **kwargs)).eval()
    expected = randomise_(timm.create_model(name, features_only=True, **kwargs)).eval()
    assert all(torch.equal(one, other) for one, other in zip(model(image), expected(image), strict=True))


@pytest.mark.parametrize(('out_indices', 'strides'), [
    (None, [4, 8, 16, 32]), ((0, 2), [2, 8]), ((-1,), [32]), ((1, -2), [4, 16]), ((3, 1), [4, 16]), ((4, -1), [32])])
def test_out_channels_and_strides_are_those_of_the_maps_in_the_models_order(out_indices, strides, image):
    model = build_rl_backbone(timm='resnet50', out_indices=out_indices, channels=(4, 5, 6, 7))
    outs = model(image)
    assert model.out_strides == strides == [64 // out.shape[2] for out in outs]
    assert model.out_channels == [out.shape[1] for out in outs]


@pytest.mark.parametrize(('out_indices', 'count'), [(None, 1), ((0, 2), 2)])
def test_maps_of_a_plain_vit_are_by_default_the_last_one(out_indices, count, image):
    model = build_rl_backbone(timm='vit_tiny_patch16_224', out_indices=out_indices, **PLAIN)
    assert [tuple(out.shape) for out in model(image)] == [(2, 24, 4, 4)] * count
    assert (model.out_channels, model.out_strides, model.patch) == ([24] * count, [16] * count, 16)


def test_state_dict_keys_and_attributes_are_timms_without_the_classifier():
    model = build_rl_backbone(timm='resnet50', **TINY)
    keys = [key for key in timm.create_model('resnet50', **TINY).state_dict() if not key.startswith('fc.')]
    assert list(model.state_dict()) == keys
    assert model.grad_checkpointing is False
    assert model.layer3 is model.body.layer3
    with pytest.raises(AttributeError, match='layer9'):
        _ = model.layer9


def test_state_dict_has_no_stage_that_no_map_needs():
    keys = build_rl_backbone(timm='resnet50', out_indices=(1, 2), **TINY).state_dict()
    assert {key.split('.')[0] for key in keys} == {'conv1', 'bn1', 'layer1', 'layer2'}


@pytest.mark.parametrize('norm', [False, True])
def test_every_parameter_is_found_by_its_name(norm):
    model = build_rl_backbone(timm='vit_tiny_patch16_224', norm=norm, **PLAIN)
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter


@pytest.mark.parametrize(('stages', 'learning'), [
    (-1, {'conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4'}), (0, {'layer1', 'layer2', 'layer3', 'layer4'}),
    (2, {'layer3', 'layer4'}), (4, set())])
def test_frozen_stages_do_not_learn_and_keep_their_norms_in_eval(stages, learning):
    model = build_rl_backbone(timm='resnet50', frozen_stages=stages, **TINY).train()
    assert {name.split('.')[0] for name, p in model.named_parameters() if p.requires_grad} == learning
    training = {name.split('.')[0] for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training}
    assert training == {name.replace('conv1', 'bn1') for name in learning}


def test_frozen_stages_leave_no_block_out_at_random():
    model = build_rl_backbone(timm='resnet50', frozen_stages=2, drop_path_rate=0.5, **TINY).train()
    training = {name.split('.')[0]: module.training for name, module in model.named_modules()
                if isinstance(module, DropPath)}
    assert training == {'layer1': False, 'layer2': False, 'layer3': True, 'layer4': True}


def test_norm_eval_keeps_all_norms_in_eval():
    model = build_rl_backbone(timm='resnet50', norm_eval=True, replacement=EVERY_SECOND, **TINY).train()
    assert not any(module.training for module in model.modules() if isinstance(module, _BatchNorm))


@pytest.mark.parametrize('settings', [
    dict(transfer=dict(type='Tensors', names=['layer1.0.conv1.weight'])),
    dict(replacement=dict(EVERY_SECOND, fusion=dict(type='OwnWeights', learn=False)))], ids=['transfer', 'fixed'])
def test_norms_that_others_have_frozen_go_on_with_their_statistics(settings):
    model = build_rl_backbone(timm='resnet50', **settings, **TINY).train()
    assert all(module.training for module in model.modules() if isinstance(module, _BatchNorm))


def test_fusing_and_converting_norms_with_activations_inside_is_refused():
    model = build_rl_backbone(timm='efficientnet_lite0')
    with pytest.raises(RuntimeError, match='fuse_conv_bn would drop the activations'):
        fuse_conv_bn(model)
    detector = nn.Sequential(model)
    cfg = Config(dict(sync_bn='torch', launcher='pytorch'))
    with pytest.raises(UserError, match='sync_bn=.torch.: it would drop the activations .*, such as 0.bn1'):
        check_distributed(cfg, detector)
    check_distributed(Config(dict(sync_bn='torch')), detector)
    check_distributed(cfg, build_rl_backbone(timm='resnet50', **TINY))
    fuse_conv_bn(build_rl_backbone(timm='resnet50', **TINY))


# Weights from files

def test_weights_of_another_file_in_the_folder_are_not_used(folder, weights, download):
    save_file(weights, folder / 'resnet50.a2_in1k.safetensors')
    with pytest.raises(FileNotFoundError, match='resnet50.a1_in1k'):
        read_timm_weights(NAME)
    assert len(download) == 1


@pytest.mark.parametrize('save', [('.safetensors', save_file), ('.pth', torch.save)], ids=['safetensors', 'pth'])
def test_weights_pretrained_true_takes_torch_hubs_folders_file(save, folder, weights, download):
    save[1](weights, folder / f'{NAME}{save[0]}')
    model = build_rl_backbone(timm=NAME, pretrained=True, replacement=EVERY_SECOND, **TINY)
    model.init_weights()
    for key, value in model.state_dict().items():
        assert key.endswith('.coeff') or torch.equal(value, weights[key]), key
    assert all(layer.norm_stale for layer in computing_layers(model).values())
    assert download == []


@pytest.mark.parametrize(('source', 'save', 'prefix'), [
    ('{}.safetensors', save_file, ''), ('timm://{}.safetensors', save_file, ''), ('timm://{}.pth', torch.save, ''),
    ('{}.pth', torch.save, 'backbone.')])
def test_weights_of_a_named_file_are_used_once(source, save, prefix, tmp_path, weights):
    source = source.format(tmp_path / 'x')
    save({prefix + key: value for key, value in weights.items()}, source.removeprefix('timm://'))
    model = build_rl_backbone(timm='resnet50', replacement=EVERY_SECOND, **TINY, init_cfg=dict(
        type='Pretrained', checkpoint=source, prefix=prefix))
    model.init_weights()
    assert torch.equal(model.layer3[2].conv2.weight, weights['layer3.2.conv2.weight'])
    nn.init.zeros_(model.conv1.weight)
    model.init_weights()
    assert not model.conv1.weight.any()


def test_weights_without_init_cfg_are_timms_initial_ones(assert_same_state):
    torch.manual_seed(0)
    expected = timm.create_model('resnet50', num_classes=0, **TINY).state_dict()
    torch.manual_seed(0)
    model = build_rl_backbone(timm='resnet50', **TINY)
    model.init_weights()
    assert_same_state(model.state_dict(), expected)


def test_weights_that_need_code_are_not_read(tmp_path):
    torch.save({'conv1.weight': torch.zeros(1), 'made_by': os.path.join}, tmp_path / 'x.pth')
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match='path.join'):
        read_timm_weights(str(tmp_path / 'x.pth'))


# Without a network

def test_no_file_and_no_network_names_the_file_and_its_place_in_the_preflight(folder, download):
    model = build_rl_backbone(timm=NAME, pretrained=True, **TINY)
    with pytest.raises(UserError, match=rf'the weights {NAME} are not on this machine .*model\.safetensors of timm/'
                                        rf'{NAME} .*put it at {folder / NAME}\.safetensors, or .*checkpoint=FILE\)'):
        load_checkpoint_(model, model.init_cfg['checkpoint'])
    assert [args[0] for args in download] == ['timm/resnet50.a1_in1k']


def test_no_file_and_no_network_of_weights_at_an_address_names_the_address_file(folder, download, monkeypatch):
    config = timm.get_pretrained_cfg(NAME)
    monkeypatch.setattr(config, 'hf_hub_id', None)
    monkeypatch.setattr(config, 'url', 'https://example.org/weights/resnet50_a1.pth')
    monkeypatch.setattr(timm, 'get_pretrained_cfg', lambda name: config)
    with pytest.raises(FileNotFoundError, match=r'download resnet50_a1\.pth where there is a network'):
        read_timm_weights(NAME)
    assert download == [('https://example.org/weights/resnet50_a1.pth',)]


@pytest.mark.parametrize(('name', 'match'), [
    ('resnet50.zz_in1k', r"timm has no weights 'resnet50.zz_in1k'; it has resnet50\."),
    ('resnet999', "timm has no weights 'resnet999'"),
    ('/nothing.safetensors', r'nothing\.safetensors: there is no such checkpoint file')])
def test_weights_that_are_nowhere_raise(name, match, folder, download):
    with pytest.raises(FileNotFoundError, match=match):
        read_timm_weights(name)
    assert download == []


# The preflight

@pytest.mark.parametrize(('source', 'kwargs'), [
    ('resnet50', TINY), ('vit_tiny_patch16_224', dict(PLAIN, img_size=64)),
    ('vit_tiny_patch16_224', dict(PLAIN, img_size=96))])
def test_preflight_accepts_timms_own_file_for_images_of_any_size(source, kwargs, tmp_path):
    made = timm.create_model(source, **kwargs if 'channels' in kwargs else dict(kwargs, img_size=64))
    save_file(made.state_dict(), tmp_path / 'x.safetensors')
    model = build_rl_backbone(timm=source, replacement=EVERY_SECOND, **kwargs)
    assert set(load_checkpoint_(model, str(tmp_path / 'x.safetensors')).initialised) == set(computing_layers(model))


def test_preflight_refuses_the_file_of_a_shallower_model(tmp_path):
    save_file(timm.create_model('resnet26', **TINY).state_dict(), tmp_path / 'x.safetensors')
    model = build_rl_backbone(timm='resnet50', replacement=EVERY_SECOND, **TINY)
    with pytest.raises(UserError, match=r"don't fit the model: .*layer1\.2\.conv1\.weight is missing"):
        load_checkpoint_(model, str(tmp_path / 'x.safetensors'))


def test_preflight_refuses_positions_that_timm_cannot_interpolate(tmp_path):
    state = dict(timm.create_model('vit_tiny_patch16_224', **PLAIN).state_dict(), pos_embed=torch.zeros(1, 16, 24))
    save_file(state, tmp_path / 'vit.safetensors')
    with pytest.raises(UserError, match=r"timm can't read weights with position embeddings of shape \(1, 16, 24\) as "
                                        'vit_tiny_patch16_224'):
        load_checkpoint_(build_rl_backbone(timm='vit_tiny_patch16_224', **PLAIN), str(tmp_path / 'vit.safetensors'))


# Bad input

REFUSED = {
    'unknown_name': (dict(timm='convnext_tinny'), r"timm has no model 'convnext_tinny'; did you mean convnext_tiny,"),
    'unknown_name_like_no_other': (dict(timm='zzzqqq'), r"no model 'zzzqqq'; timm.list_models\('\*NAME\*'\) searches"),
    'unknown_tag': (dict(timm='resnet50.zz_in1k', **TINY), r'resnet50\.zz_in1k|zz_in1k.*resnet50'),
    'features_only': (dict(timm='resnet50', features_only=True), 'leave features_only out.*out_indices says which'),
    'unknown_argument': (dict(timm='resnet50', widht=2), r"timm model resnet50: .*unexpected keyword argument 'widht'"),
    'out_indices': (dict(timm='resnet50', out_indices=(1, 5), **TINY),
                    r'out_indices \(1, 5\) has 5, but its 5 feature maps are 0 \(stride 2, 64 channels\), 1 '),
    'out_indices_negative': (dict(timm='resnet50', out_indices=(-6,), **TINY), r'out_indices \(-6,\) has -6'),
    'frozen_stages': (dict(timm='resnet50', frozen_stages=5, **TINY),
                      'resnet50: frozen_stages=5, but there are 4 stages; allowed: -1 to 4'),
    'two_starts': (dict(timm='resnet50', pretrained=True, init_cfg=dict(type='Pretrained', checkpoint='x.pth')),
                   'resnet50: pretrained=True and init_cfg both say what to start from; leave one out'),
    'init_cfg_without_file': (dict(timm='resnet50', init_cfg=dict(type='Normal', layer='Conv2d')),
                              r"resnet50: init_cfg must be dict\(type='Pretrained', checkpoint=FILE\), got"),
}


@pytest.mark.parametrize(('arguments', 'match'), REFUSED.values(), ids=REFUSED)
def test_bad_argument_raises(arguments, match):
    with pytest.raises(ValueError, match=match):
        build_rl_backbone(**arguments)


def test_images_smaller_than_the_stride_of_a_map_that_is_asked_for_raise():
    with pytest.raises(ValueError, match=r'resnet50: images of 64x31 pixels are smaller than the stride 32 of'):
        build_rl_backbone(timm='resnet50', **TINY)(torch.zeros(1, 3, 64, 31))
    [out] = build_rl_backbone(timm='resnet50', out_indices=(2,), **TINY).eval()(torch.zeros(1, 3, 16, 16))
    assert out.shape[2:] == (2, 2)


def test_images_that_the_model_cannot_take_raise():
    model = build_rl_backbone(timm='swin_tiny_patch4_window7_224', embed_dim=8, num_heads=(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"images of 66x64 pixels don't fit: .*; resize or pad them to a size"):
        model(torch.zeros(1, 3, 66, 64))


@pytest.mark.parametrize('name', ['resnet18', 'resnetv2_50', 'swin_tiny_patch4_window7_224', 'twins_pcpvt_small'])
def test_with_cp_keeps_less_for_backward_or_is_refused(name):
    def kept(**settings: Any) -> int:
        model = build_rl_backbone(timm=name, **settings)
        return saved_bytes(model, lambda: model(torch.zeros(1, 3, 224, 224)))
    plain = kept()
    try:
        checkpointed = kept(with_cp=True)
    except ValueError as error:
        assert str(error).startswith(f'{name}: with_cp=True, but timm {timm.__version__} can\'t checkpoint this model')
    else:
        assert name != 'twins_pcpvt_small' and checkpointed < 0.6 * plain


# Imports

def test_import_of_rl_mmdet_does_not_import_timm():
    program = ('import sys, mmdet.models, mmdet.datasets, mmdet.engine, mmdet.evaluation, mmdet.visualization\n'
               'before = "timm" in sys.modules\n'
               'import rl_mmdet\n'
               'assert ("timm" in sys.modules) == before')
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}  # rl_mmdet is found as it is here
    done = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
