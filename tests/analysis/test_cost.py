"""Parameters that learn, bytes kept for backward, and peak memory."""
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rl_mmdet.analysis import peak_memory, saved_bytes, trainable_parameters


def test_saved_bytes_counts_a_linear_layers_input_but_not_its_weight():
    model = nn.Linear(4, 3)
    inputs = torch.rand(2, 4, requires_grad=True) * 2
    assert saved_bytes(model, lambda: model(inputs)) == 2 * 4 * 4


def test_saved_bytes_counts_a_storage_once():
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    inputs = torch.rand(2, 4, requires_grad=True) * 2
    assert saved_bytes(model, lambda: [layer(inputs) for layer in model]) == 2 * 4 * 4


def test_saved_bytes_without_gradients_is_nothing():
    model = nn.Linear(4, 3).requires_grad_(False)
    assert saved_bytes(model, lambda: model(torch.rand(2, 4))) == 0


def test_trainable_parameters_leaves_out_frozen_ones():
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    assert trainable_parameters(model) == 12


def test_saved_bytes_counts_the_input_of_a_checkpointed_module():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs = torch.rand(2, 4, requires_grad=True) * 2

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(model, x, use_reentrant=False)

    layer = Checkpointed()
    layer.model = model
    assert saved_bytes(layer, lambda: layer(inputs), [layer]) == 2 * 4 * 4


def test_peak_memory_is_that_of_what_lives_together():
    def run():
        first = torch.empty(1000)
        del first
        second, third = torch.empty(300), torch.empty(900)
        return second, third

    assert peak_memory(run) == 4 * (300 + 900)


def test_peak_memory_does_not_count_what_was_there():
    there = torch.empty(1000)
    assert peak_memory(lambda: there.zero_()) == 0


def test_peak_memory_sees_backward():
    weight = torch.rand(500, requires_grad=True)
    loss = (weight * 2).sum()
    assert peak_memory(loss.backward) >= 4 * 500
