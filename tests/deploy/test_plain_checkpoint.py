"""A replaced detector's checkpoint becomes one that the baseline's config loads, with that config in it."""
import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer

from rl_mmdet.deploy import save_plain_checkpoint
from rl_mmdet.engine import UserError, build_model, load_checkpoint_, load_config


def same_features(model, other):
    image = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(model.extract_feat(image), other.extract_feat(image), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(scope='module')
def trained(write_tiny_config, randomise_, tmp_path_factory):
    """A replaced detector with its config and its checkpoint, and the baseline."""
    folder = tmp_path_factory.mktemp('trained')
    cfg = load_config(write_tiny_config(folder))
    model = randomise_(build_model(copy.deepcopy(cfg))).eval()
    meta = dict(dataset_meta=dict(classes=('a',)))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'rl.pth')
    baseline = build_model(load_config(write_tiny_config(folder, 'atss_r34_fpn_digits.py'))).eval()
    return cfg, model, str(folder / 'rl.pth'), baseline


@pytest.fixture
def save_plain(trained, tmp_path):
    """Save the plain checkpoint of a checkpoint, or of the trained one; returns the account of it."""
    def save(checkpoint=trained[2]):
        return save_plain_checkpoint(copy.deepcopy(trained[0]), str(checkpoint), str(tmp_path / 'plain.pth'))
    return save


def test_it_fits_the_baseline_and_gives_the_same_features(trained, save_plain, tmp_path):
    plain = save_plain()
    assert (len(plain.blocks), plain.light) == (5, [])
    assert plain.describe().startswith('5 computing layers are plain blocks now; its config is in the file and in ')
    assert plain.describe().endswith(
        "plain.py; it needs rl_mmdet for DigitScenesDataset; the baseline's fits as well")
    _, model, _, baseline = trained
    report = load_checkpoint_(baseline, str(tmp_path / 'plain.pth'))
    assert not report.missing
    assert not report.left_over
    saved = torch.load(tmp_path / 'plain.pth', weights_only=True)
    assert saved['meta']['dataset_meta']['classes'] == ('a',)
    baseline.load_state_dict(saved['state_dict'])
    same_features(model, baseline)


def test_of_light_operators_its_config_has_own_weights(tiny_config, tmp_path, randomise_):
    """Which blocks can be replaced depends on the fusion, so the config names them."""
    cfg = load_config(tiny_config(), {'model.backbone.replacement': dict(
        plan=dict(_delete_=True, type='EveryKth', k=2), operator=dict(type='SlimBlock'),
        fusion=dict(type='TransformFusion', rank=1, adapt=True))})
    model = randomise_(build_model(cfg)).eval()
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'rl.pth')
    plain = save_plain_checkpoint(cfg, str(tmp_path / 'rl.pth'), str(tmp_path / 'plain.pth'))
    assert (len(plain.blocks), plain.light) == (7, ['SlimBlock'])
    assert plain.describe().endswith('plain.py; it needs rl_mmdet for DigitScenesDataset, RLResNet')
    own = build_model(load_config(plain.config)).eval()
    own.load_state_dict(torch.load(tmp_path / 'plain.pth', weights_only=True)['state_dict'], strict=True)
    same_features(model, own)


@pytest.mark.parametrize(('backbone', 'channels', 'kind'), [
    (dict(backbone='MobileNetV2', widen_factor=0.25, out_indices=(2, 4, 6)), [8, 24, 80], 'MobileNetV2'),
    (dict(timm='convnext_atto', dims=(8, 16, 16, 32), depths=(2, 2, 4, 2), out_indices=(1, 2, 3)), [16, 16, 32],
     'RLBackbone')])
def test_of_any_backbone_its_config_builds_the_model(tiny_config, tmp_path, randomise_, backbone, channels, kind):
    settings = dict(_delete_=True, type='RLBackbone', **backbone,
                    replacement=dict(plan=dict(type='EveryKth', k=2), fusion=dict(adapt=True)))
    cfg = load_config(tiny_config(more=f'model = dict(backbone={settings}, '
                                  f'neck=dict(in_channels={channels}, start_level=0))\n'))
    model = randomise_(build_model(cfg)).eval()
    torch.save(model.state_dict(), tmp_path / 'rl.pth')
    plain = load_config(save_plain_checkpoint(cfg, str(tmp_path / 'rl.pth'), str(tmp_path / 'plain.pth')).config)
    assert plain.model.backbone.type == kind
    assert 'replacement' not in plain.model.backbone
    other = build_model(plain).eval()
    other.load_state_dict(torch.load(tmp_path / 'plain.pth', weights_only=True)['state_dict'])
    same_features(model, other)


ALONE = """
import json, sys
sys.modules['rl_mmdet'] = None  # importing it fails
import numpy as np
from mmdet.apis import DetInferencer
detect = DetInferencer(weights=sys.argv[1], device='cpu', show_progress=False)
json.dump(detect(np.load(sys.argv[2]))['predictions'], open(sys.argv[3], 'w'))
"""


def test_where_rl_mmdet_is_not_installed_the_file_alone_predicts_the_same(tiny_config, tmp_path, randomise_):
    coco = "dict(_delete_=True, type='CocoDataset', metainfo=dict(classes=('a', 'b')), pipeline=_base_.test_pipeline)"
    cfg = load_config(tiny_config(more='model = dict(test_cfg=dict(score_thr=0., max_per_img=9))\n' + ''.join(
        f'{phase}_dataloader = dict(dataset={coco})\n' for phase in ('train', 'val', 'test'))))
    model = randomise_(build_model(cfg))
    meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=('a', 'b')))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'rl.pth')
    assert save_plain_checkpoint(cfg, str(tmp_path / 'rl.pth'), str(tmp_path / 'plain.pth')).needs == []
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    np.save(tmp_path / 'picture.npy', picture)
    subprocess.run([sys.executable, '-c', ALONE, *(str(tmp_path / name) for name in (
        'plain.pth', 'picture.npy', 'found.json'))], check=True, capture_output=True)
    [found] = json.loads((tmp_path / 'found.json').read_text())
    detect = DetInferencer(weights=str(tmp_path / 'rl.pth'), device='cpu', show_progress=False)
    [wanted] = detect(picture)['predictions']
    assert found['labels'] == wanted['labels']
    assert found['scores'] == pytest.approx(wanted['scores'], rel=1e-4)
    np.testing.assert_allclose(found['bboxes'], wanted['bboxes'], atol=1e-2)


@pytest.mark.parametrize('name', ['plain.pth', 'plain.py'])
def test_it_overwrites_nothing(save_plain, tmp_path, name):
    (tmp_path / name).write_text('mine')
    with pytest.raises(UserError, match=f'{name}: exists already'):
        save_plain()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == 'mine'


def test_of_a_baseline_or_of_non_finite_weights_it_is_refused(trained, save_plain, tmp_path):
    _, model, _, baseline = trained
    torch.save(baseline.state_dict(), tmp_path / 'baseline.pth')
    with pytest.raises(UserError, match='ordinary checkpoint already'):
        save_plain(tmp_path / 'baseline.pth')
    state = model.state_dict()
    state['backbone.layer3.1.coeff'] = torch.full_like(state['backbone.layer3.1.coeff'], float('nan'))
    torch.save(state, tmp_path / 'broken.pth')
    with pytest.raises(UserError, match='layer3.1: .*non-finite'):
        save_plain(tmp_path / 'broken.pth')
    assert not (tmp_path / 'plain.pth').exists()


@pytest.mark.parametrize(('side', 'accepted'), [(128, True), (99, False)])
def test_it_is_checked_on_a_size_that_the_model_takes(trained, save_plain, tmp_path, monkeypatch, side, accepted):
    detector = type(trained[1])
    extract_feat = detector.extract_feat

    def refuse(self, images):
        if images.shape[-1] != side:
            raise ValueError(f'takes {side} pixels')
        return extract_feat(self, images)
    monkeypatch.setattr(detector, 'extract_feat', refuse)
    if accepted:
        save_plain()
    else:
        with pytest.raises(UserError, match='none of the image sizes .* suits the model.*takes 99 pixels'):
            save_plain()
    assert (tmp_path / 'plain.pth').exists() == accepted
