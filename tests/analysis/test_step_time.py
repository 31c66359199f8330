"""Steps of two models, timed in turn."""
from rl_mmdet.analysis import alternate_steps


def test_alternate_steps_runs_the_two_in_turn_and_drops_the_first_round():
    calls = []
    times = alternate_steps({'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}, rounds=2, per_round=2)
    assert ''.join(calls) == 'aabb' * 3
    assert len(times.ratios) == 2
    assert set(times.seconds) == {'a', 'b'}


def test_step_times_ratio_is_the_median_over_rounds():
    from rl_mmdet.analysis import StepTimes
    assert StepTimes(seconds={'a': 1., 'b': 2.}, ratios=[1., 2., 9.]).ratio == 2.
