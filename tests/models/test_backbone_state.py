"""Every backbone class: copies, averages, initial values, its own state dict and the baseline's."""
import copy
import pickle

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn

from rl_mmdet.replacement import adapt_state_dict, computing_layers, materialize


@pytest.fixture(scope='module')
def model(case, randomise_, in_mode) -> nn.Module:
    """With random weights and statistics, in eval mode; the tests leave it as it is."""
    return in_mode(randomise_(case.build()), False)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=['deepcopy', 'pickle'])
def test_duplicate_has_the_outputs_and_does_not_follow_the_original(model, duplicate, image, randomise_):
    original = copy.deepcopy(model)
    expected, twin = original(image), duplicate(original)
    randomise_(original, seed=2)
    assert all(torch.equal(one, other) for one, other in zip(twin(image), expected, strict=True))


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


def test_own_state_dict_restores_the_outputs(case, model, randomise_, in_mode, image, tmp_path):
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    restored = in_mode(randomise_(case.build(), seed=2), False)
    restored.load_state_dict(torch.load(tmp_path / 'own.pth', weights_only=True), strict=True)
    assert all(torch.equal(one, other) for one, other in zip(restored(image), model(image), strict=True))
    assert not any(layer.norm_stale for layer in computing_layers(restored).values())


def test_init_weights_leaves_the_coefficients(case):
    model = case.build()
    model.init_weights()
    assert {tuple(layer.coeff.tolist()) for layer in computing_layers(model).values()} == {(0.5, 0.5)}


def test_baselines_state_dict_gives_kept_tensors_and_makes_the_norms_stale(case, randomise_):
    state = randomise_(case.build_baseline(), seed=3).state_dict()
    model = case.build()
    model.load_state_dict(state, strict=True)
    for key, value in model.state_dict().items():
        assert key.endswith('.coeff') or torch.equal(value, state[key]), key
    assert all(layer.norm_stale for layer in computing_layers(model).values())
    _, report = adapt_state_dict(model, state)
    assert (report.missing, report.left_over, report.mismatched) == ([], [], {})
    assert set(report.initialised) == set(computing_layers(model))


def test_materialized_state_dict_loads_into_the_baseline(case, model, image, in_mode, assert_near):
    baseline = case.build_baseline()
    baseline.load_state_dict(materialize(model).state_dict(), strict=True)
    assert_near(in_mode(baseline, False)(image), model(image))
