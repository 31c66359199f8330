"""Fusions: with what. The equation, the start values, and the fit to a removed block's weights."""
import pytest
import torch

from rl_mmdet.replacement import ScalarFusion

A, B = 0.7, -1.3


@pytest.fixture
def pairs() -> dict:
    """A convolution that both neighbours have, a bias, and one tensor of either neighbour alone."""
    return {
        'conv': (torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)),
        'bias': (torch.randn(4), torch.randn(4)),
        'only_after': (None, torch.randn(5, 2)),
        'only_before': (torch.randn(2, 5), None),
    }


def planted(pairs: dict) -> dict:
    """Weights that a·before + b·after gives, a missing side counting as nothing."""
    return {name: A * (0 if before is None else before) + B * (0 if after is None else after)
            for name, (before, after) in pairs.items()}


def test_fuse_both_neighbours_is_the_weighted_sum(pairs):
    made = ScalarFusion().fuse({'coeff': torch.tensor([A, B])}, pairs)
    torch.testing.assert_close(made['conv'], A * pairs['conv'][0] + B * pairs['conv'][1])


def test_fuse_only_the_neighbour_after_is_scaled_by_b(pairs):
    made = ScalarFusion().fuse({'coeff': torch.tensor([A, B])}, pairs)
    torch.testing.assert_close(made['only_after'], B * pairs['only_after'][1])


def test_fuse_only_the_neighbour_before_is_scaled_by_a(pairs):
    made = ScalarFusion().fuse({'coeff': torch.tensor([A, B])}, pairs)
    torch.testing.assert_close(made['only_before'], A * pairs['only_before'][0])


def test_new_parameters_default_is_one_half_each():
    coeff = ScalarFusion().new_parameters(torch.device('cpu'), torch.float32)['coeff']
    assert coeff.tolist() == [0.5, 0.5]


def test_new_parameters_init_dtype_and_learning():
    parameters = ScalarFusion(init=0.25).new_parameters(torch.device('cpu'), torch.float64)
    assert list(parameters) == ['coeff']
    assert parameters['coeff'].tolist() == [0.25, 0.25]
    assert parameters['coeff'].dtype == torch.float64
    assert parameters['coeff'].requires_grad


@pytest.mark.parametrize('init', [float('nan'), float('inf'), '0.5', True, None])
def test_scalar_fusion_wrong_init_raises(init):
    with pytest.raises(ValueError, match='init must be a finite number, got'):
        ScalarFusion(init=init)


def test_scalar_fusion_unknown_pretrained_names_the_allowed():
    with pytest.raises(ValueError, match="unknown pretrained='median'; allowed: average, least_squares"):
        ScalarFusion(pretrained='median')


def test_fit_average_ignores_the_removed_weights(pairs):
    fit = ScalarFusion(init=0.4, pretrained='average').fit(planted(pairs), pairs)
    torch.testing.assert_close(fit.parameters['coeff'], torch.tensor([0.4, 0.4]))


def test_fit_average_residual_is_the_relative_distance():
    pairs = {'w': (torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]))}
    fit = ScalarFusion().fit({'w': torch.tensor([1.0, 3.0])}, pairs)  # made: (1, 1)
    assert fit.residual == pytest.approx((4 / 10) ** 0.5)


def test_fit_least_squares_recovers_planted_coefficients(pairs):
    doubles = {n: tuple(None if t is None else t.double() for t in pair) for n, pair in pairs.items()}
    fit = ScalarFusion(pretrained='least_squares').fit(planted(doubles), doubles)
    torch.testing.assert_close(fit.parameters['coeff'], torch.tensor([A, B], dtype=torch.float64),
                               rtol=1e-12, atol=1e-12)


def test_fit_least_squares_planted_residual_is_zero(pairs):
    assert ScalarFusion(pretrained='least_squares').fit(planted(pairs), pairs).residual < 1e-6


def test_fit_least_squares_noisy_weights_equal_lstsq(pairs):
    targets = {name: value + torch.randn_like(value) for name, value in planted(pairs).items()}
    columns = [torch.cat([(torch.zeros_like(targets[n]) if pair[side] is None else pair[side]).flatten()
                          for n, pair in pairs.items()]) for side in (0, 1)]
    expected = torch.linalg.lstsq(torch.stack(columns, 1).double(),
                                  torch.cat([t.flatten() for t in targets.values()]).double()[:, None])
    fit = ScalarFusion(pretrained='least_squares').fit(targets, pairs)
    torch.testing.assert_close(fit.parameters['coeff'].double(), expected.solution[:, 0],
                               rtol=1e-5, atol=1e-6)


def test_fit_least_squares_is_no_worse_than_average(pairs):
    targets = {name: value + torch.randn_like(value) for name, value in planted(pairs).items()}
    best = ScalarFusion(pretrained='least_squares').fit(targets, pairs).residual
    assert best < ScalarFusion(pretrained='average').fit(targets, pairs).residual


def test_fit_least_squares_equal_neighbours_share_the_weight():
    same = torch.randn(4, 4)
    fit = ScalarFusion(pretrained='least_squares').fit({'w': 3 * same}, {'w': (same, same)})
    torch.testing.assert_close(fit.parameters['coeff'], torch.tensor([1.5, 1.5]))


def test_fit_least_squares_zero_neighbours_is_finite():
    pairs = {'w': (torch.zeros(3), torch.zeros(3))}
    fit = ScalarFusion(pretrained='least_squares').fit({'w': torch.ones(3)}, pairs)
    assert fit.parameters['coeff'].tolist() == [0.0, 0.0]
    assert fit.residual == 1.0


def test_fit_keeps_the_weights_dtype(pairs):
    halves = {n: tuple(None if t is None else t.half() for t in pair) for n, pair in pairs.items()}
    targets = {name: value.half() for name, value in planted(pairs).items()}
    fit = ScalarFusion(pretrained='least_squares').fit(targets, halves)
    assert fit.parameters['coeff'].dtype == torch.float16


def test_fit_does_not_change_its_inputs(pairs):
    targets = planted(pairs)
    before = {name: value.clone() for name, value in targets.items()}
    ScalarFusion(pretrained='least_squares').fit(targets, pairs)
    assert all(torch.equal(targets[name], before[name]) for name in targets)
