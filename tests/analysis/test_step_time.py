"""Steps of several models, timed in turn."""
from rl_mmdet.analysis import ratios_to, seconds_in_turn


def test_seconds_in_turn_gives_every_step_its_turn_and_reads_the_clock_given():
    calls, now = [], [0.]

    def step(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds
        return run

    taken = seconds_in_turn({'a': step('a', 1.), 'b': step('b', 2.), 'c': step('c', 4.)}, rounds=2, per_round=2,
                            clock=lambda: now[0])
    assert ''.join(calls) == 'aabbcc' * 3
    assert taken == {'a': [1., 1.], 'b': [2., 2.], 'c': [4., 4.]}


def test_ratios_are_taken_round_by_round():
    assert ratios_to({'a': [1., 2.], 'b': [3., 8.]}, 'a') == {'a': [1., 1.], 'b': [3., 4.]}
