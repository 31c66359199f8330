"""Parameters that learn, peak memory, and times in turn."""
import torch
from torch import nn

from rl_mmdet.analysis import peak_memory, ratios_to, seconds_in_turn, trainable_parameters


def test_trainable_parameters_leaves_out_frozen_ones():
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    assert trainable_parameters(model) == 12


def test_peak_memory_is_that_of_what_is_made_and_lives_together():
    there, weight = torch.empty(1000), torch.rand(500, requires_grad=True)

    def run():
        first = torch.empty(1000)
        del first
        return torch.empty(300), torch.empty(900)

    assert peak_memory(run) == 4 * (300 + 900)
    assert peak_memory(lambda: there.zero_()) == 0
    assert peak_memory((weight * 2).sum().backward) >= 4 * 500


def test_seconds_in_turn_gives_every_step_its_turn_and_reads_the_clock_given():
    calls, now = [], [0.]

    def step(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds
        return run

    taken = seconds_in_turn({'a': step('a', 1.), 'b': step('b', 2.)}, rounds=2, per_round=2, clock=lambda: now[0])
    assert ''.join(calls) == 'aabb' * 3
    assert taken == {'a': [1., 1.], 'b': [2., 2.]}
    assert ratios_to({'a': [1., 2.], 'b': [3., 8.]}, 'a') == {'a': [1., 1.], 'b': [3., 4.]}
