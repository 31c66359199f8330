"""Parameters that learn, bytes kept for backward, peak memory, and times in turn."""
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rl_mmdet.analysis import peak_memory, ratios_to, saved_bytes, seconds_in_turn, trainable_parameters


def test_trainable_parameters_leaves_out_frozen_ones():
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    assert trainable_parameters(model) == 12


def test_saved_bytes_counts_each_input_once_and_no_weights():
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    inputs = torch.rand(2, 4, requires_grad=True) * 2
    assert saved_bytes(model, lambda: [layer(inputs) for layer in model]) == 2 * 4 * 4
    model.requires_grad_(False)
    assert saved_bytes(model, lambda: model[0](torch.rand(2, 4))) == 0


def test_saved_bytes_counts_the_input_of_a_checkpointed_module():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs = torch.rand(2, 4, requires_grad=True) * 2

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(model, x, use_reentrant=False)

    layer = Checkpointed()
    layer.model = model
    assert saved_bytes(layer, lambda: layer(inputs), [layer]) == 2 * 4 * 4


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
