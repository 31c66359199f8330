"""Every backbone class: copies, averages, initial values, its own state dict and the baseline's."""
import copy
import pickle

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn

from rl_mmdet.replacement import adapt_state_dict, computing_layers, materialize


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.fixture(scope='module')
def model(case, randomise_, in_mode) -> nn.Module:
    """With random weights and statistics, in eval mode; the tests leave it as it is."""
    return in_mode(randomise_(case.build()), False)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, pickled])
def test_duplicate_points_into_itself(model, duplicate):
    twin = duplicate(model)
    own = {id(module) for module in twin.modules()}
    assert {id(block) for layer in computing_layers(twin).values() for block in layer.kept} <= own


def test_deepcopy_does_not_follow_the_original(model, image, randomise_):
    original = copy.deepcopy(model)
    expected, twin = original(image), copy.deepcopy(original)
    randomise_(original, seed=2)
    assert all(torch.equal(one, other) for one, other in zip(twin(image), expected, strict=True))


def test_pickle_round_trip_has_the_outputs(model, image):
    assert all(torch.equal(one, other) for one, other in zip(pickled(model)(image), model(image), strict=True))


def test_ema_materializes_to_blocks_made_of_averages(model, randomise_):
    model = copy.deepcopy(model)
    ema = ExponentialMovingAverage(model, momentum=0.5)
    ema.update_parameters(model)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    randomise_(model, seed=2)
    ema.update_parameters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((parameter + first[name]) / 2)
    averaged, by_hand = (dict(materialize(each).named_parameters()) for each in (ema.module, model))
    for name, parameter in by_hand.items():
        torch.testing.assert_close(averaged[name], parameter, msg=name)


@pytest.fixture(scope='module')
def restored(case, model, randomise_, in_mode, tmp_path_factory) -> nn.Module:
    """Another one, which has loaded the first one's state dict from a file."""
    path = tmp_path_factory.mktemp('own') / 'own.pth'
    torch.save(model.state_dict(), path)
    target = in_mode(randomise_(case.build(), seed=2), False)
    target.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return target


def test_own_state_dict_restores_the_outputs(model, restored, image):
    assert all(torch.equal(one, other) for one, other in zip(restored(image), model(image), strict=True))


def test_own_state_dict_leaves_no_norm_stale(restored):
    assert not any(layer.norm_stale for layer in computing_layers(restored).values())


def test_init_weights_leaves_the_coefficients(case):
    model = case.build()
    model.init_weights()
    assert {tuple(layer.coeff.tolist()) for layer in computing_layers(model).values()} == {(0.5, 0.5)}


@pytest.fixture(scope='module')
def baseline(case, randomise_) -> nn.Module:
    return randomise_(case.build_baseline(), seed=3)


@pytest.fixture(scope='module')
def loaded(case, baseline) -> nn.Module:
    """One that has loaded the baseline's state dict."""
    model = case.build()
    model.load_state_dict(baseline.state_dict(), strict=True)
    return model


def test_baselines_state_dict_is_explained_to_the_last_key(loaded, baseline):
    _, report = adapt_state_dict(loaded, baseline.state_dict())
    assert (report.missing, report.left_over, report.mismatched) == ([], [], {})
    assert set(report.fits) == set(computing_layers(loaded))


def test_baselines_state_dict_gives_kept_tensors_and_buffers(loaded, baseline):
    state = baseline.state_dict()
    for key, value in loaded.state_dict().items():
        assert key.endswith('.coeff') or torch.equal(value, state[key]), key


def test_baselines_state_dict_makes_the_norms_stale(loaded):
    assert all(layer.norm_stale for layer in computing_layers(loaded).values())


def test_baselines_state_dict_of_planted_blocks_gives_the_baselines_outputs(case, baseline, image, in_mode,
                                                                          assert_near):
    """Where the removed blocks are combinations of their neighbours, least squares finds these."""
    model = case.build(fusion=dict(pretrained='least_squares'))
    names = {module: name for name, module in model.named_modules()}
    planted = copy.deepcopy(baseline)
    with torch.no_grad():
        for index, (name, layer) in enumerate(computing_layers(model).items()):
            for tensor, sides in layer.sources.items():
                planted.get_parameter(f'{name}.{tensor}').copy_(sum(
                    factor * planted.get_parameter(f'{names[layer.kept[side]]}.{tensor}')
                    for factor, side in zip((0.75, 0.25 - index / 8), sides, strict=True) if side is not None))
    model.load_state_dict(planted.state_dict())
    assert_near(in_mode(model, False)(image), in_mode(planted, False)(image), 1e-3)


def test_materialized_state_dict_loads_into_the_baseline(case, model, image, in_mode, assert_near):
    baseline = case.build_baseline()
    baseline.load_state_dict(materialize(model).state_dict(), strict=True)
    assert_near(in_mode(baseline, False)(image), model(image))
