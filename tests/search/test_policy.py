"""The policy: the limit is kept at every moment, and learning spends it where it does the least harm."""
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_mmdet.search import Policy, Unit


def units(weights: list[float]) -> list[Unit]:
    return [Unit(f'u{index}', f's{3 * index // len(weights)}', index / max(1, len(weights) - 1), 'A', 100, weight)
            for index, weight in enumerate(weights)]


SAVING = [-0.02, -0.05, -0.05, -0.1, -0.01, -0.2, -0.02, -0.1, -0.05, -0.1]
COSTING = [-weight for weight in SAVING]
SLOPE = torch.linspace(-1, 1, 10)
signs = pytest.mark.parametrize('weights', [SAVING, COSTING], ids=['saving', 'costing'])


def policy(weights: list[float] = SAVING, limit: float | None = None, steps: int = 100, **more: Any) -> Policy:
    return Policy(units(weights), 0.4 * sum(weights) if limit is None else limit, steps, **more)


def expected_weight(policy: Policy) -> float:
    """Σ p·w."""
    return sum(p * unit.weight for p, unit in zip(policy.probabilities().tolist(), policy.units, strict=True))


def learn(policy: Policy, gradient: Callable[[], Tensor], steps: int) -> list[list[bool]]:
    drawn = []
    for _ in range(steps):
        drawn.append(policy.sample())
        policy.learn(gradient())
    return drawn


# The limit

@signs
@pytest.mark.parametrize('share', [0.02, 0.3, 0.7, 0.97])
def test_limit_is_kept_on_average_from_the_start(weights, share):
    limit = share * sum(weights)
    assert expected_weight(policy(weights, limit)) == pytest.approx(limit, rel=1e-3)


@signs
def test_limit_is_kept_on_average_while_learning_and_settling(weights):
    searching, noise = policy(weights, 0.5 * sum(weights), 100), torch.Generator().manual_seed(1)
    searching.settle(3, True)
    searching.settle(5, False)
    for _ in range(4):
        drawn = learn(searching, lambda: torch.randn(10, generator=noise) + SLOPE, 18)
        assert all(gates[3] and not gates[5] for gates in drawn)
        assert expected_weight(searching) == pytest.approx(0.5 * sum(weights), rel=1e-3)
    assert searching.probabilities().std() > 0.05
    assert searching.settled[[3, 5]].tolist() == [1, 0]


@signs
def test_gates_are_open_as_often_as_their_probability_says(weights):
    searching = policy(weights)
    drawn = torch.tensor([searching.sample() for _ in range(600)]).double().mean(0)
    torch.testing.assert_close(drawn, searching.probabilities(), rtol=0, atol=0.07)


@pytest.mark.parametrize('weights', [[-1e-9, -1e-9, -0.5, -0.3, -1e-4], [-0.1] * 4, [-0.1]],
                         ids=['far apart', 'equal', 'one'])
def test_weights_of_all_kinds(weights, recwarn):
    searching = policy(weights)
    learn(searching, lambda: torch.ones(len(weights)), 5)
    assert expected_weight(searching) == pytest.approx(searching.limit, rel=1e-3)
    assert searching.weight(searching.best()) <= searching.limit
    assert not recwarn


# Learning

WEIGHTS = torch.empty(24).uniform_(0.01, 0.1, generator=torch.Generator().manual_seed(0)).tolist()
WORTH = torch.randn(24, generator=torch.Generator().manual_seed(1)).exp().tolist()
"""What each of 24 units does to the loss if it is taken, regardless of its weight; 0.1 to 5."""


@pytest.mark.parametrize(('sign', 'share'), [(-1, 0.3), (1, 0.6)], ids=['saving', 'costing'])
def test_learns_to_spend_the_limit_where_it_does_the_most_good(sign, share):
    """The gradient at a gate is the unit's worth, in noise that is as large; within 1.2 of a greedy choice's loss."""
    limit, noise = sign * share * sum(WEIGHTS), torch.Generator().manual_seed(0)
    searching = policy([sign * weight for weight in WEIGHTS], limit, 500)
    learn(searching, lambda: -sign * torch.tensor(WORTH) + 2 * torch.randn(24, generator=noise), 500)
    left, greedy = abs(limit), 0.
    for index in sorted(range(24), key=lambda index: -sign * WORTH[index] / WEIGHTS[index]):
        if left > 0 if sign < 0 else WEIGHTS[index] <= left:
            left, greedy = left - WEIGHTS[index], greedy + WORTH[index]
    taken = sum(worth for worth, gate in zip(WORTH, searching.best(), strict=True) if gate)
    assert searching.weight(searching.best()) <= limit
    assert taken <= 1.2 * greedy if sign < 0 else taken >= greedy / 1.2


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_gradients_that_arent_finite_count_as_zero(bad):
    """Even if they are all there is at first."""
    broken, zero = policy(), policy()
    for number in range(7):
        for searching, value in ((broken, bad), (zero, 0.)):
            searching.sample()
            searching.learn(torch.where(torch.arange(10) == number, value, SLOPE) if number else
                            torch.full((10,), value))
    assert torch.equal(broken.probabilities(), zero.probabilities())
    assert broken.probabilities().std() > 0.01


def test_steps_without_a_gradient_count_and_teach_nothing():
    searching = policy(steps=4)
    for _ in range(4):
        searching.sample()
        searching.learn(None)
    assert torch.equal(searching.scores, policy().scores)
    assert not searching.settled.isnan().any()


def test_settled_gates_learn_nothing():
    searching, other = policy(), policy()
    for each in (searching, other):
        each.settle(2, True)
    learn(searching, lambda: SLOPE, 20)
    learn(other, lambda: SLOPE.index_fill(0, torch.tensor(2), 1e3), 20)
    assert torch.equal(searching.probabilities(), other.probabilities())


def test_scores_are_shared_after_each_step():
    searching = policy()
    searching.sample()
    searching.learn(SLOPE, lambda scores: scores.copy_(torch.arange(10.)))
    assert searching.scores.tolist() == list(range(10))


def test_temperature_falls_geometrically_from_the_first_to_the_last_step():
    searching, found = policy(steps=3), []
    for _ in range(3):
        found.append(searching.temperature)
        learn(searching, lambda: torch.zeros(10), 1)
    assert found == pytest.approx([1, 0.2 ** 0.5, 0.2])
    assert policy(steps=1).temperature == 1


# Seeds and states

def test_equal_seeds_equal_gates_and_the_global_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one, same, other = (learn(policy(seed=seed), lambda: SLOPE, 20) for seed in (4, 4, 5))
    assert one == same != other
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize('at', [0, 1, 13])
def test_resumed_it_goes_on_bit_for_bit(at):
    noise = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))

    def go_on(searching: Policy, steps: range) -> list:
        found = []
        for step in steps:
            found.append((searching.sample(), searching.probabilities().tolist(), searching.temperature))
            searching.learn(noise[step])
        return found

    first, resumed, third = policy(steps=20, seed=2), policy(steps=20, seed=9), policy(steps=20, seed=9)
    go_on(first, range(at))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    third.load_state_dict(state)
    assert go_on(resumed, range(at, 20)) == go_on(first, range(at, 20)) == go_on(third, range(at, 20))
    assert torch.equal(resumed.settled, first.settled)


def test_a_state_of_another_search_is_refused():
    with pytest.raises(ValueError, match='^the search was for other blocks or tensors$'):
        policy(SAVING[:9]).load_state_dict(policy().state_dict())
    with pytest.raises(ValueError, match='^the search was to take 50 steps and would now take 100$'):
        policy().load_state_dict(policy(steps=50).state_dict())


# The best selection

@pytest.fixture
def ranked() -> Callable[..., Policy]:
    """A policy that would take its units in their order."""
    def build(weights: list[float], limit: float, **more: Any) -> Policy:
        searching = Policy(units(weights), limit, 10, **more)
        total, middle = 0., 0  # the unit with which the limit is reached gets the score 0, and the multiplier stays 0
        while abs(total + weights[middle]) < abs(limit) - 1e-9:
            total, middle = total + weights[middle], middle + 1
        searching.scores = 100. * (middle - torch.arange(len(weights)).double())
        return searching
    return build


@pytest.mark.parametrize(('weights', 'limit', 'taken'), [
    ([-0.1] * 6, -0.25, [0, 1, 2]), ([0.1] * 6, 0.25, [0, 1]),
    # where the most probable would miss the limit by more than the tolerance, the next ones stand in for them
    ([-0.3, -0.3, -0.1, -0.1], -0.395, [0, 2]), ([0.3, 0.3, 0.1, 0.1], 0.405, [0, 2]),
    # where no selection is within the tolerance, the nearest
    ([-0.3] * 3, -0.4, [0, 1]), ([0.3] * 3, 0.5, [0])], ids=str)
def test_best_keeps_the_limit_and_comes_near_it_with_the_most_probable(ranked, weights, limit, taken):
    assert [index for index, gate in enumerate(ranked(weights, limit).best()) if gate] == taken


def test_best_keeps_settled_gates(ranked):
    searching = ranked([-0.1] * 6, -0.25)
    searching.settle(0, False)
    searching.settle(5, True)
    assert searching.best() == [False, True, True, False, False, True]
    for index in range(6):
        searching.settle(index, index == 2)
    assert searching.best() == [index == 2 for index in range(6)]


@pytest.mark.parametrize(('weights', 'limit'), [([-0.1] * 6, -0.25), ([0.1] * 6, 0.35)])
def test_only_what_fits_together_is_drawn_and_taken(ranked, weights, limit):
    def fits(gates: list[bool]) -> bool:
        return not any(one and other for one, other in itertools.pairwise(gates))

    assert ranked(weights, limit, fits=fits).best() == [True, False] * 3
    drawn = [policy(fits=fits, seed=seed).sample() for seed in range(20)]
    assert all(map(fits, drawn)) and len({str(gates) for gates in drawn}) > 5


@signs
@pytest.mark.parametrize('share', [0.1, 0.33, 0.8])
def test_best_of_many_units_nearly_reaches_the_limit(weights, share):
    weights = [weight * (1 + index / 50) for index, weight in enumerate(weights * 4)]
    searching = policy(weights, share * sum(weights), tolerance=0.01 * abs(sum(weights)))
    learn(searching, lambda: torch.linspace(-1, 1, 40), 30)
    left = searching.limit - searching.weight(searching.best())
    assert 0 <= left <= 0.011 * abs(sum(weights))


def test_gates_settle_one_by_one_in_the_second_half_the_most_certain_first():
    searching, counts = policy(steps=20), []
    for _ in range(20):
        certainty, free = (searching.probabilities() - 0.5).abs(), searching.settled.isnan()
        learn(searching, lambda: SLOPE, 1)
        new = free & ~searching.settled.isnan()
        assert not new.any() or certainty[new].min() >= certainty[free].max() - 0.05
        counts.append(10 - int(searching.settled.isnan().sum()))
    assert counts == [0] * 10 + list(range(1, 11))
    assert searching.weight(searching.best()) <= searching.limit
