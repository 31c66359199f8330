"""Parameters that learn, and bytes kept for backward."""
import torch
from torch import nn

from rl_mmdet.analysis import saved_bytes, trainable_parameters


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
