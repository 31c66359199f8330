"""A replaced detector's checkpoint becomes one that the baseline's config loads."""
import copy

import pytest
import torch

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
    assert plain.describe().endswith("5 computing layers are plain blocks now; use it with the baseline's config")
    _, model, _, baseline = trained
    report = load_checkpoint_(baseline, str(tmp_path / 'plain.pth'))
    assert not report.missing
    assert not report.left_over
    saved = torch.load(tmp_path / 'plain.pth', weights_only=True)
    assert saved['meta']['dataset_meta']['classes'] == ('a',)
    baseline.load_state_dict(saved['state_dict'])
    same_features(model, baseline)


@pytest.mark.parametrize('operator', ['DepthwiseBlock', 'SlimBlock'])
def test_of_light_operators_it_fits_own_weights(tiny_config, tmp_path, randomise_, operator):
    cfg = load_config(tiny_config(), {'model.backbone.replacement.operator.type': operator})
    model = randomise_(build_model(cfg)).eval()
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'rl.pth')
    plain = save_plain_checkpoint(cfg, str(tmp_path / 'rl.pth'), str(tmp_path / 'plain.pth'))
    assert (len(plain.blocks), plain.light) == (5, [operator])
    assert "fusion=dict(type='OwnWeights')" in plain.describe()
    cfg.model.backbone.replacement.fusion = dict(type='OwnWeights')
    own = build_model(cfg).eval()
    own.load_state_dict(torch.load(tmp_path / 'plain.pth', weights_only=True)['state_dict'], strict=True)
    same_features(model, own)


def test_it_overwrites_nothing(save_plain, tmp_path):
    (tmp_path / 'plain.pth').write_text('mine')
    with pytest.raises(UserError, match='exists already'):
        save_plain()
    assert (tmp_path / 'plain.pth').read_text() == 'mine'


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
