"""The policy: the budget is kept at every moment, and learning spends it where it does the least harm."""
import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_mmdet.search import Policy, Unit


def units(weights: list[float], sizes: list[int] | None = None, kinds: str = 'A') -> list[Unit]:
    return [Unit(f'u{index}', f's{3 * index // len(weights)}', index / max(1, len(weights) - 1),
                 kinds[index % len(kinds)], (sizes or [100] * len(weights))[index], weight)
            for index, weight in enumerate(weights)]


SAVING = [-0.02, -0.05, -0.05, -0.1, -0.01, -0.2, -0.02, -0.1, -0.05, -0.1]
COSTING = [-weight for weight in SAVING]


def policy(weights: list[float] = SAVING, target: float | None = None, steps: int = 100, **more: Any) -> Policy:
    return Policy(units(weights), 0.4 * sum(weights) if target is None else target, steps, **more)


def expected_weight(policy: Policy) -> float:
    """Σ p·w, in the units' weights."""
    return sum(p * unit.weight for p, unit in zip(policy.probabilities().tolist(), policy.units, strict=True))


def learn(policy: Policy, gradient: Callable[[list[bool]], Tensor], steps: int) -> list[list[bool]]:
    drawn = []
    for _ in range(steps):
        drawn.append(policy.sample())
        policy.learn(gradient(drawn[-1]))
    return drawn


# The budget

signs = pytest.mark.parametrize('weights', [SAVING, COSTING], ids=['saving', 'costing'])


@signs
@pytest.mark.parametrize('part', [0.02, 0.3, 0.7, 0.97])
def test_budget_is_kept_on_average_from_the_start(weights, part):
    target = part * sum(weights)
    assert expected_weight(policy(weights, target)) == pytest.approx(target, rel=1e-3)


@signs
@pytest.mark.parametrize('part', [0.3, 0.7])
@pytest.mark.parametrize('steps', [1, 20, 100])
def test_budget_is_kept_on_average_while_learning(weights, part, steps):
    searching = policy(weights, part * sum(weights), 100)
    noise = torch.Generator().manual_seed(1)
    learn(searching, lambda gates: torch.randn(10, generator=noise) + torch.linspace(-1, 1, 10), steps)
    assert expected_weight(searching) == pytest.approx(part * sum(weights), rel=1e-3)
    assert searching.probabilities().std() > (0 if steps == 1 else 0.05)


@signs
def test_budget_is_kept_on_average_with_settled_gates(weights):
    searching = policy(weights, 0.5 * sum(weights))
    searching.settle(3, True)
    searching.settle(5, False)
    learn(searching, lambda gates: torch.linspace(-1, 1, 10), 30)
    assert expected_weight(searching) == pytest.approx(0.5 * sum(weights), rel=1e-3)
    assert searching.probabilities()[[3, 5]].tolist() == [1, 0]


@signs
def test_gates_are_open_as_often_as_their_probability_says(weights):
    searching = policy(weights)
    found = torch.tensor([searching.sample() for _ in range(600)]).double().mean(0)
    torch.testing.assert_close(found, searching.probabilities(), rtol=0, atol=0.07)


def test_units_of_weights_far_apart(recwarn):
    weights = [-1e-9, -1e-9, -0.5, -0.3, -1e-4]
    searching = policy(weights, -0.4)
    assert expected_weight(searching) == pytest.approx(-0.4, rel=1e-3)
    assert searching.weight(searching.best()) <= -0.4


@pytest.mark.parametrize('weights', [[-0.1], [-0.1] * 4], ids=['one', 'equal'])
def test_units_that_are_all_alike(weights, recwarn):
    searching = policy(weights)
    learn(searching, lambda gates: torch.ones(len(weights)), 5)
    assert expected_weight(searching) == pytest.approx(searching.target, rel=1e-3)
    if len(weights) > 1:
        assert not recwarn


def test_a_single_unit_is_no_reason_for_a_warning(recwarn):
    policy([-0.1])
    assert not recwarn


# Learning

WEIGHTS = torch.empty(24).uniform_(0.01, 0.1, generator=torch.Generator().manual_seed(0)).tolist()
WORTH = torch.randn(24, generator=torch.Generator().manual_seed(1)).exp().tolist()
"""What each of 24 units does to the loss if it is chosen, regardless of its weight; 0.1 to 5."""
HARM = torch.tensor(WORTH[:10])


@pytest.mark.parametrize('part', [0.3, 0.6])
def test_learns_to_save_where_it_does_little_harm(part):
    """The gradient at a gate is the unit's harm, in noise that is as large."""
    target, noise = -part * sum(WEIGHTS), torch.Generator().manual_seed(0)
    searching = policy([-weight for weight in WEIGHTS], target, 800)
    learn(searching, lambda gates: torch.tensor(WORTH) + 2 * torch.randn(24, generator=noise), 800)
    chosen = searching.best()
    left = target
    harm = 0.
    for index in sorted(range(24), key=lambda index: WORTH[index] / WEIGHTS[index]):
        if left < 0:
            left, harm = left + WEIGHTS[index], harm + WORTH[index]
    assert searching.weight(chosen) <= target
    assert worth(chosen) <= 1.2 * harm


@pytest.mark.parametrize('part', [0.3, 0.6])
def test_learns_to_spend_where_it_does_the_most_good(part):
    target, noise = part * sum(WEIGHTS), torch.Generator().manual_seed(0)
    searching = policy(WEIGHTS, target, 300)
    learn(searching, lambda gates: -torch.tensor(WORTH) + 2 * torch.randn(24, generator=noise), 300)
    chosen = searching.best()
    left, good = target, 0.
    for index in sorted(range(24), key=lambda index: -WORTH[index] / WEIGHTS[index]):
        if WEIGHTS[index] <= left:
            left, good = left - WEIGHTS[index], good + WORTH[index]
    assert searching.weight(chosen) <= target
    assert worth(chosen) >= good / 1.2


def worth(gates: list[bool]) -> float:
    return sum(value for value, gate in zip(WORTH, gates, strict=True) if gate)


def test_equally_harmful_units_are_chosen_by_what_they_save():
    """As few as keep the budget: a unit that saves little isn't worth the harm."""
    searching, noise = policy(SAVING, -0.4, 400), torch.Generator().manual_seed(0)
    learn(searching, lambda gates: 1 + torch.randn(10, generator=noise), 400)
    chosen = searching.best()
    assert chosen[5] and sum(chosen) <= 4


def test_certain_at_the_end():
    searching = policy(SAVING, steps=400)
    learn(searching, lambda gates: HARM, 400)
    assert ((searching.probabilities() - 0.5).abs() > 0.4).sum() >= 8


def test_the_gradients_scale_doesnt_matter():
    small, large = policy(), policy()
    learn(small, lambda gates: 1e-4 * HARM, 30)
    learn(large, lambda gates: 1e4 * HARM, 30)
    torch.testing.assert_close(small.probabilities(), large.probabilities(), rtol=1e-3, atol=1e-4)


def test_no_gradient_no_learning():
    searching = policy()
    before = searching.probabilities()
    learn(searching, lambda gates: torch.zeros(10), 1)
    later = policy()
    later.step = 1
    torch.testing.assert_close(searching.probabilities(), later.probabilities())
    assert torch.equal(searching.scores, policy().scores)
    assert before.shape == (10,)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_gradients_that_arent_finite_count_as_zero(bad):
    broken, zero = policy(), policy()
    for number in range(6):
        gradient = torch.linspace(-1, 1, 10)
        for searching, value in ((broken, bad), (zero, 0.)):
            searching.sample()
            gradient[number] = value
            searching.learn(gradient.clone())
    assert torch.equal(broken.probabilities(), zero.probabilities())
    assert broken.probabilities().isfinite().all()


def test_only_non_finite_gradients_at_first_then_it_learns():
    searching = policy()
    searching.sample()
    searching.learn(torch.full((10,), float('nan')))
    learn(searching, lambda gates: HARM, 60)
    assert searching.probabilities().std() > 0.1


def test_settled_gates_learn_nothing():
    searching, other = policy(), policy()
    for each in (searching, other):
        each.settle(2, True)
    learn(searching, lambda gates: torch.linspace(-1, 1, 10), 20)
    learn(other, lambda gates: torch.linspace(-1, 1, 10).index_fill(0, torch.tensor(2), 1e3), 20)
    assert torch.equal(searching.probabilities(), other.probabilities())


def test_scores_are_shared_after_each_step():
    searching = policy()
    searching.sample()
    searching.learn(torch.linspace(-1, 1, 10), lambda scores: scores.copy_(torch.arange(10.)))
    assert searching.scores.tolist() == list(range(10))


# Temperature

def test_temperature_falls_geometrically_from_the_first_to_the_last_step():
    searching, found = policy(steps=5, temperature=(1.6, 0.1)), []
    for _ in range(5):
        found.append(searching.temperature)
        learn(searching, lambda gates: torch.zeros(10), 1)
    assert found == pytest.approx([1.6, 0.8, 0.4, 0.2, 0.1])
    assert searching.temperature == pytest.approx(0.1)


def test_temperature_of_a_single_step_is_the_first():
    assert policy(steps=1, temperature=(1.6, 0.1)).temperature == 1.6


def test_lower_temperatures_are_more_certain():
    searching = policy(steps=100)
    learn(searching, lambda gates: HARM, 50)
    uncertain = (0.5 - (searching.probabilities() - 0.5).abs()).mean()
    searching.step = 99
    assert (0.5 - (searching.probabilities() - 0.5).abs()).mean() < uncertain


# Seeds and states

def test_equal_seeds_equal_gates():
    one, same, other = (policy(seed=seed) for seed in (4, 4, 5))
    found = [learn(each, lambda gates: torch.linspace(-1, 1, 10), 20) for each in (one, same, other)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(one.probabilities(), same.probabilities())


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    learn(policy(), lambda gates: torch.linspace(-1, 1, 10), 3)
    assert torch.equal(torch.rand(3), expected)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize('at', [0, 1, 7])
def test_resumed_it_goes_on_bit_for_bit(at):
    noise = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))

    def go_on(searching: Policy, steps: range) -> list:
        found = []
        for step in steps:
            found.append((searching.sample(), searching.probabilities().tolist(), searching.temperature))
            searching.learn(noise[step])
        return found

    first = policy(seed=2)
    go_on(first, range(at))
    if at:
        first.settle(3, True)
    state = through_a_file(first.state_dict())
    resumed = policy(seed=9)
    resumed.load_state_dict(state)
    assert go_on(resumed, range(at, 20)) == go_on(first, range(at, 20))
    assert resumed.settled == first.settled


def test_state_that_is_loaded_twice_is_shared_by_nobody():
    state = through_a_file(policy().state_dict())
    one, other = policy(), policy()
    one.load_state_dict(state)
    other.load_state_dict(state)
    one.settle(3, True)
    assert other.settled == [None] * 10


def test_load_state_of_other_units_is_refused():
    state = policy().state_dict()
    other = Policy(units(SAVING[:9]), -0.1, 100)
    with pytest.raises(ValueError, match='^the policy was learned for other units$'):
        other.load_state_dict(state)


def test_load_state_for_another_number_of_steps_is_refused():
    searching = policy(steps=100)
    before = copy.deepcopy(searching.state_dict())
    with pytest.raises(ValueError, match='^the search was to take 50 steps and would now take 100$'):
        searching.load_state_dict(policy(steps=50).state_dict())
    assert searching.state_dict()['step'] == before['step']


# The choice

def test_settle_fixes_a_gate():
    searching = policy()
    searching.settle(1, True)
    searching.settle(2, False)
    drawn = torch.tensor([searching.sample() for _ in range(50)])
    assert drawn[:, 1].all() and not drawn[:, 2].any()
    assert searching.settled == [None, True, False, *[None] * 7]


def test_most_certain_is_the_free_gate_furthest_from_one_half():
    searching = policy()
    order = []
    learn(searching, lambda gates: torch.linspace(-1, 1, 10), 20)
    while (index := searching.most_certain()) is not None:
        certainty = (searching.probabilities() - 0.5).abs()
        free = [number for number in range(10) if searching.settled[number] is None]
        assert certainty[index] == certainty[free].max()
        searching.settle(index, bool(searching.probabilities()[index] > 0.5))
        order.append(index)
    assert sorted(order) == list(range(10))


@pytest.fixture
def ranked() -> Callable[..., Policy]:
    """A policy that would choose its units in their order."""
    def build(weights: list[float], target: float) -> Policy:
        searching = Policy(units(weights), target, 10)
        total, middle = 0., 0  # the unit with which the budget is used up gets the score 0, and the multiplier stays 0
        while abs(total + weights[middle]) < abs(target) - 1e-9:
            total, middle = total + weights[middle], middle + 1
        searching.scores = 100. * (middle - torch.arange(len(weights)).double())
        assert searching.probabilities().argsort(descending=True, stable=True).tolist() == list(range(len(weights)))
        return searching
    return build


def test_best_keeps_the_budget_with_the_most_probable(ranked):
    assert ranked([-0.1] * 6, -0.25).best() == [True] * 3 + [False] * 3
    assert ranked([0.1] * 6, 0.25).best() == [True] * 2 + [False] * 4


def test_best_uses_the_budget_up_to_within_the_tolerance(ranked):
    """Where the most probable would miss it by more, the next ones stand in for them."""
    assert ranked([-0.3, -0.3, -0.1, -0.1], -0.395).best() == [True, False, True, False]
    assert ranked([0.3, 0.3, 0.1, 0.1], 0.405).best() == [True, False, True, False]


def test_best_where_no_choice_is_within_the_tolerance_comes_as_near_as_it_must(ranked):
    assert ranked([-0.3, -0.3, -0.3], -0.4).best() == [True, True, False]
    assert ranked([0.3, 0.3, 0.3], 0.5).best() == [True, False, False]


def test_best_keeps_settled_gates(ranked):
    searching = ranked([-0.1] * 6, -0.25)
    searching.settle(0, False)
    searching.settle(5, True)
    assert searching.best() == [False, True, True, False, False, True]


def test_best_with_all_settled_is_that(ranked):
    searching = ranked([-0.1] * 3, -0.15)
    for index, gate in enumerate((True, False, True)):
        searching.settle(index, gate)
    assert searching.best() == [True, False, True]


def test_best_takes_only_what_fits_together(ranked):
    def fits(gates: list[bool]) -> bool:
        return not any(one and other for one, other in itertools.pairwise(gates))

    assert ranked([-0.1] * 6, -0.25).best(fits) == [True, False] * 3
    assert ranked([0.1] * 6, 0.35).best(fits) == [True, False] * 3


@signs
@pytest.mark.parametrize('part', [0.1, 0.33, 0.8])
def test_best_keeps_the_budget_and_nearly_uses_it_up(weights, part):
    weights = [weight * (1 + index / 50) for index, weight in enumerate(weights * 4)]
    searching = policy(weights, part * sum(weights), tolerance=0.01 * abs(sum(weights)))
    learn(searching, lambda gates: torch.linspace(-1, 1, 40), 30)
    left = searching.target - searching.weight(searching.best())
    assert 0 <= left <= 0.011 * abs(sum(weights))


def test_weight_is_that_of_the_chosen():
    assert policy().weight([True, False, True, *[False] * 7]) == pytest.approx(-0.07)


# What it refuses

@pytest.mark.parametrize(('weights', 'target', 'steps', 'message'), [
    ([], -0.1, 10, 'there is nothing to choose from'),
    (SAVING, -0.1, 0, 'a policy needs at least one step to learn, got 0'),
    (SAVING, -0.8, 10, 'no choice keeps to the budget: the lowest is -0.7, the target -0.8'),
    (COSTING, -0.1, 10, 'no choice keeps to the budget: the lowest is 0, the target -0.1'),
    (SAVING, 0., 10, 'every choice keeps to the budget: the highest is 0, the target 0'),
    (COSTING, 0.75, 10, 'every choice keeps to the budget: the highest is 0.7, the target 0.75'),
])
def test_refuses(weights, target, steps, message):
    with pytest.raises(ValueError) as error:
        Policy(units(weights), target, steps)
    assert str(error.value) == message
