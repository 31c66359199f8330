"""FLOPs of a run: formulas written out by hand."""
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rl_mmdet.replacement.flops import count_flops


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 16, 8, 8, requires_grad=True)


@pytest.mark.parametrize('groups', [1, 4, 16])
@pytest.mark.parametrize('stride', [1, 2])
def test_convolution(image, groups, stride):
    conv = nn.Conv2d(16, 32, 3, stride=stride, padding=1, groups=groups)
    forward = 2 * (2 * 32 * (8 // stride) ** 2) * (16 // groups * 9)
    assert count_flops(lambda: conv(image)) == forward
    assert count_flops(lambda: conv(image).sum().backward()) == 3 * forward


def test_convolution_whose_input_learns_nothing_has_no_input_gradient(image):
    conv = nn.Conv2d(16, 32, 3, padding=1)
    forward = 2 * (2 * 32 * 64) * (16 * 9)
    assert count_flops(lambda: conv(image.detach()).sum().backward()) == 2 * forward


def test_convolution_whose_weight_learns_nothing_has_no_weight_gradient(image):
    conv = nn.Conv2d(16, 32, 3, padding=1, groups=2).requires_grad_(False)
    assert count_flops(lambda: conv(image).sum().backward()) == 2 * 2 * (2 * 32 * 64) * (8 * 9)


def test_transposed_convolution(image):
    conv = nn.ConvTranspose2d(16, 32, 2, stride=2)
    forward = 2 * (2 * 16 * 64) * (32 * 4)
    assert count_flops(lambda: conv(image)) == forward
    assert count_flops(lambda: conv(image).sum().backward()) == 3 * forward


def test_linear():
    layer, x = nn.Linear(6, 10), torch.rand(5, 6, requires_grad=True)
    assert count_flops(lambda: layer(x)) == 2 * 5 * 6 * 10
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 5 * 6 * 10


def test_attention_on_a_cpu():
    """Two products forward; backward the scores again, and two products for each of the two."""
    x = torch.rand(1, 2, 8, 4, requires_grad=True)
    product = 2 * 2 * 8 * 8 * 4
    assert count_flops(lambda: scaled_dot_product_attention(x, x, x)) == 2 * product
    assert count_flops(lambda: scaled_dot_product_attention(x, x, x).sum().backward()) == 7 * product
