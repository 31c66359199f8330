"""A replaced detector's checkpoint becomes one that the baseline's config loads."""
import pytest
import torch

from rl_mmdet.deploy import save_plain_checkpoint
from rl_mmdet.engine import UserError, build_model, check_checkpoint, load_config


@pytest.fixture
def trained(tiny_config, tmp_path, randomise_):
    cfg = load_config(tiny_config())
    model = randomise_(build_model(cfg)).eval()
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=('a',)))), tmp_path / 'rl.pth')
    return cfg, model, str(tmp_path / 'rl.pth')


def test_plain_checkpoint_fits_the_baseline_and_gives_the_same_features(trained, tiny_config, tmp_path):
    cfg, model, checkpoint = trained
    out = str(tmp_path / 'plain.pth')
    plain = save_plain_checkpoint(cfg, checkpoint, out)
    assert (len(plain.blocks), plain.light) == (5, [])
    assert plain.describe().endswith("5 computing layers are plain blocks now; use it with the baseline's config")
    baseline = build_model(load_config(tiny_config('atss_r34_fpn_digits.py'))).eval()
    report = check_checkpoint(baseline, out)
    assert not report.missing
    assert not report.left_over
    saved = torch.load(out, weights_only=True)
    assert saved['meta']['dataset_meta']['classes'] == ('a',)
    baseline.load_state_dict(saved['state_dict'])
    image = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(model.extract_feat(image), baseline.extract_feat(image), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('operator', ['DepthwiseBlock', 'SlimBlock', 'PooledBlock'])
def test_plain_checkpoint_of_light_operators_fits_own_weights(tiny_config, tmp_path, randomise_, operator):
    cfg = load_config(tiny_config(), {'model.backbone.replacement.operator.type': operator})
    model = randomise_(build_model(cfg)).eval()
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'rl.pth')
    plain = save_plain_checkpoint(cfg, str(tmp_path / 'rl.pth'), str(tmp_path / 'plain.pth'))
    assert (len(plain.blocks), plain.light) == (5, [operator])
    assert "fusion=dict(type='OwnWeights')" in plain.describe()
    cfg.model.backbone.replacement.fusion = dict(type='OwnWeights')
    own = build_model(cfg).eval()
    own.load_state_dict(torch.load(tmp_path / 'plain.pth', weights_only=True)['state_dict'], strict=True)
    image = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(model.extract_feat(image), own.extract_feat(image), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_plain_checkpoint_overwrites_nothing(trained, tmp_path):
    cfg, _, checkpoint = trained
    (tmp_path / 'plain.pth').write_text('mine')
    with pytest.raises(UserError, match='exists already'):
        save_plain_checkpoint(cfg, checkpoint, str(tmp_path / 'plain.pth'))
    assert (tmp_path / 'plain.pth').read_text() == 'mine'


def test_plain_checkpoint_of_a_baseline_is_refused(trained, tiny_config, tmp_path):
    baseline = build_model(load_config(tiny_config('atss_r34_fpn_digits.py')))
    torch.save(baseline.state_dict(), tmp_path / 'baseline.pth')
    with pytest.raises(UserError, match='ordinary checkpoint already'):
        save_plain_checkpoint(trained[0], str(tmp_path / 'baseline.pth'), str(tmp_path / 'plain.pth'))


def test_plain_checkpoint_with_non_finite_weights_is_refused(trained, tmp_path):
    cfg, model, _ = trained
    model.backbone.layer3[1].coeff.data[0] = float('nan')
    torch.save(model.state_dict(), tmp_path / 'broken.pth')
    with pytest.raises(UserError, match='layer3.1: .*non-finite'):
        save_plain_checkpoint(cfg, str(tmp_path / 'broken.pth'), str(tmp_path / 'plain.pth'))
    assert not (tmp_path / 'plain.pth').exists()


def only_take(monkeypatch, cfg, side):
    """Let the config's detector refuse images of all sizes but one."""
    detector = type(build_model(cfg))
    extract_feat = detector.extract_feat

    def refuse(self, images):
        if images.shape[-1] != side:
            raise ValueError(f'takes {side} pixels')
        return extract_feat(self, images)
    monkeypatch.setattr(detector, 'extract_feat', refuse)


def test_plain_checkpoint_is_checked_on_a_size_that_the_model_takes(trained, tmp_path, monkeypatch):
    cfg, _, checkpoint = trained
    only_take(monkeypatch, cfg, 128)
    assert len(save_plain_checkpoint(cfg, checkpoint, str(tmp_path / 'plain.pth')).blocks) == 5


def test_plain_checkpoint_that_cannot_be_checked_is_not_written(trained, tmp_path, monkeypatch):
    cfg, _, checkpoint = trained
    only_take(monkeypatch, cfg, 99)
    with pytest.raises(UserError, match='none of the image sizes .* suits the model.*takes 99 pixels'):
        save_plain_checkpoint(cfg, checkpoint, str(tmp_path / 'plain.pth'))
    assert not (tmp_path / 'plain.pth').exists()
