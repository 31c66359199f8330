"""Bytes kept for backward: each storage once, weights not, of layers that compute again their input."""
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rl_mmdet.replacement.saved_bytes import saved_bytes


@pytest.fixture
def inputs():
    return torch.rand(2, 4, requires_grad=True) * 2


@pytest.mark.parametrize('count', [1, 3])
def test_an_input_counts_once_and_weights_dont(inputs, count):
    layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(count))
    assert saved_bytes(layers, lambda: [layer(inputs) for layer in layers]) == inputs.numel() * 4


def test_without_gradients_it_is_nothing(inputs):
    model = nn.Linear(4, 3).requires_grad_(False)
    assert saved_bytes(model, lambda: model(inputs.detach())) == 0


def test_graphs_that_are_dropped_dont_count(inputs):
    model = nn.Linear(4, 3)

    def forward():
        model(torch.rand(50, 4))
        return model(inputs)

    assert saved_bytes(model, forward) == inputs.numel() * 4


def test_checkpointed_modules_keep_their_input(inputs):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    assert saved_bytes(model, lambda: model(inputs), [model]) == inputs.numel() * 4


def test_all_is_freed_afterwards(inputs):
    results = []

    def forward():
        out = torch.tanh(inputs).exp()  # both keep their results
        results.append(weakref.ref(out))
        return out

    assert saved_bytes(nn.Linear(4, 3), forward) == 2 * inputs.numel() * 4
    assert results[0]() is None
