"""ScalarFusion: the equation, and the fit to a removed block's weights."""
from collections.abc import Callable
from functools import partial

import pytest
import torch

from rl_mmdet.replacement.fusions import Fit, ScalarFusion

A, B = 0.7, -1.3


@pytest.fixture
def fit() -> Callable[..., Fit]:
    return partial(ScalarFusion().fit, least_squares=True)


@pytest.fixture
def planted(pairs_of, mixed) -> dict:
    return mixed([(A, B)] * 5, pairs_of())


def test_equation(pairs_of, start_of, planted):
    fusion = ScalarFusion()
    assert {name: tuple(p.shape) for name, p in start_of(fusion).items()} == {'coeff': (2,)}
    made = fusion.fuse({'coeff': torch.tensor([A, B], dtype=torch.float64)}, pairs_of())
    for name, expected in planted.items():
        torch.testing.assert_close(made[name], expected)


def test_fit_average_ignores_the_removed_weights_and_has_the_relative_distance():
    pairs = {'w': (torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]))}
    fit = ScalarFusion().fit({'w': torch.tensor([1.0, 3.0])}, pairs)  # made: (1, 1)
    assert fit.parameters['coeff'].tolist() == [0.5, 0.5]
    assert fit.residual == pytest.approx((4 / 10) ** 0.5)


def test_fit_least_squares_recovers_planted_coefficients(pairs_of, planted, fit):
    before = {name: value.clone() for name, value in planted.items()}
    found = fit(planted, pairs_of())
    torch.testing.assert_close(found.parameters['coeff'], torch.tensor([A, B], dtype=torch.float64))
    assert found.residual < 1e-10
    assert all(torch.equal(planted[name], before[name]) for name in planted)
    halves = {n: tuple(None if t is None else t.half() for t in pair) for n, pair in pairs_of().items()}
    assert fit({n: t.half() for n, t in planted.items()}, halves).parameters['coeff'].dtype == torch.float16


def test_fit_least_squares_of_noisy_weights_is_lstsq(pairs_of, planted, fit):
    targets, pairs = {name: value + torch.randn_like(value) for name, value in planted.items()}, pairs_of()
    columns = [torch.cat([(torch.zeros_like(targets[n]) if pair[side] is None else pair[side]).flatten()
                          for n, pair in pairs.items()]) for side in (0, 1)]
    expected = torch.linalg.lstsq(torch.stack(columns, 1), torch.cat([t.flatten() for t in targets.values()])[:, None])
    found = fit(targets, pairs)
    torch.testing.assert_close(found.parameters['coeff'], expected.solution[:, 0])
    assert found.residual < ScalarFusion().fit(targets, pairs).residual


def test_fit_least_squares_of_neighbours_that_dont_determine_it(fit):
    same = torch.randn(4, 4)
    found = fit({'w': 3 * same}, {'w': (same, same)})
    torch.testing.assert_close(found.parameters['coeff'], torch.tensor([1.5, 1.5]))
    found = fit({'w': torch.ones(3)}, {'w': (torch.zeros(3), torch.zeros(3))})
    assert (found.parameters['coeff'].tolist(), found.residual) == ([0.0, 0.0], 1.0)


def test_fit_of_some_tensors_is_theirs(pairs_of, shapes, fit):
    known = {'table': pairs_of()['table']}
    found = fit({'table': 2 * known['table'][0]}, known, shapes)
    assert found.parameters['coeff'].tolist() == pytest.approx([2.0, 0.0], abs=1e-12)
