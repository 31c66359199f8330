"""Shape adaptation: every rule for weights, kernels, vectors and position tables, and what can't be resized."""
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rl_mmdet.replacement.resize import can_resize, kind_of, resize, stretch


@pytest.mark.parametrize(('name', 'shape'), [('conv1.weight', (4, 3, 3, 3)), ('cls', ())])
def test_resize_to_the_own_shape_is_the_tensor_itself(name, shape):
    tensor = torch.randn(shape)
    assert resize(name, tensor, torch.Size(shape)) is tensor


@pytest.mark.parametrize(('name', 'shape', 'kind'), [
    ('conv.weight', (4, 3, 3, 3), 'weight'),
    ('fc.weight', (4, 3), 'weight'),
    ('conv_dw.weight', (4, 1, 1, 1), 'weight'),
    ('norm.weight', (4,), 'vector'),
    ('gamma', (4, 1, 1), 'vector'),
    ('temperature', (), 'vector'),
    ('attn.relative_position_bias_table', (49, 3), 'table'),
    ('attn.rel_pos_h', (27, 64), 'table'),
])
def test_kind_of_a_tensor(name, shape, kind):
    assert kind_of(name, shape) == kind


# Channels

def test_stretch_equals_the_floor_formula_along_any_axis():
    tensor = torch.randn(5, 6, 7)
    for axis, size in [(0, 8), (1, 4), (2, 7), (1, 13)]:
        columns = [tensor.select(axis, int(u * tensor.shape[axis] / size)) for u in range(size)]
        assert torch.equal(stretch(tensor, size, axis), torch.stack(columns, axis))


@pytest.mark.parametrize('channels', [6, 2])
def test_query_key_and_value_stay_in_their_parts(channels):
    parts = torch.arange(3.0).repeat_interleave(4)  # 0: query, 1: key, 2: value
    expected = [part for part in (0, 1, 2) for _ in range(channels)]
    assert resize('qkv.bias', parts, (3 * channels,)).tolist() == expected
    assert resize('qkv.weight', parts[:, None], (3 * channels, 1)).flatten().tolist() == expected


@pytest.mark.parametrize(('old', 'new'), [(64, 96), (96, 64)])
@pytest.mark.parametrize('space', [(), (3, 3)], ids=['linear', 'convolution'])
def test_independent_inputs_give_outputs_of_the_same_variance(old, new, space):
    weight, count = torch.randn(256, old, *space), 512

    def variance(weight: Tensor) -> float:
        return (weight.flatten(1) @ torch.randn(weight[0].numel(), count)).var().item()

    assert variance(resize('weight', weight, (256, new, *space))) == pytest.approx(variance(weight), rel=0.05)


def test_input_channels_are_chosen_and_weighted_as_the_equation_says():
    weight = torch.randn(2, 3)
    made = resize('weight', weight, (4, 6))
    for u in range(4):
        for v in range(6):
            assert made[u, v].item() == pytest.approx((3 / 6) ** 0.5 * weight[u // 2, v // 2].item())


# Kernels

@pytest.mark.parametrize(('old', 'new'), [((1, 1), (3, 3)), ((3, 1), (5, 3))])
def test_grown_kernel_computes_the_same(old, new):
    weight, x = torch.randn(4, 3, *old), torch.randn(2, 3, 9, 9)
    expected = F.conv2d(x, weight, padding=(old[0] // 2, old[1] // 2))
    made = resize('conv.weight', weight, (4, 3, *new))
    torch.testing.assert_close(F.conv2d(x, made, padding=(new[0] // 2, new[1] // 2)), expected)


@pytest.mark.parametrize(('old', 'new'), [((3, 3), (1, 1)), ((5, 3), (3, 1)), ((7, 3), (3, 5))])
def test_resized_kernel_keeps_the_response_to_a_constant(old, new):
    weight = torch.randn(4, 3, *old, dtype=torch.float64)
    made = resize('conv.weight', weight, (4, 3, *new))
    assert tuple(made.shape) == (4, 3, *new)
    torch.testing.assert_close(made.sum((2, 3)), weight.sum((2, 3)))


def test_shrunk_kernel_is_summed_over_areas():
    weight = torch.randn(2, 2, 6, 6)
    blocks = weight.view(2, 2, 3, 2, 3, 2).sum((3, 5))
    torch.testing.assert_close(resize('weight', weight, (2, 2, 3, 3)), blocks)


# Vectors

@pytest.mark.parametrize(('shape', 'new', 'expected'), [
    ((3,), (6,), [0, 0, 1, 1, 2, 2]),
    ((4,), (2,), [0, 2]),
    ((2, 1, 1), (4, 1, 1), [0, 0, 1, 1]),
])
def test_vectors_repeat_or_leave_out_channels(shape, new, expected):
    made = resize('norm.weight', torch.arange(float(shape[0])).view(shape), new)
    assert tuple(made.shape) == new
    assert made.flatten().tolist() == expected


# Tables

def test_square_table_is_bicubic():
    table = torch.randn(9, 2)
    made = resize('table', table, (25, 2))
    for head in range(2):
        expected = F.interpolate(table[:, head].view(1, 1, 3, 3), size=(5, 5), mode='bicubic', align_corners=False)
        torch.testing.assert_close(made[:, head], expected.flatten())


@pytest.mark.parametrize(('old', 'new'), [(7, 13), (12, 25), (25, 12)])
def test_other_table_is_linear_along_its_positions(old, new):
    table = torch.randn(old, 3, dtype=torch.float64)
    made = resize('rel_pos_h', table, (new, 3))
    for place in range(new):
        at = min(max((place + 0.5) * old / new - 0.5, 0), old - 1)
        low = min(int(at), old - 2)
        torch.testing.assert_close(made[place], table[low] * (low + 1 - at) + table[low + 1] * (at - low))


def test_constant_table_stays_constant():
    for old, new in [(49, 169), (169, 49), (7, 20)]:
        torch.testing.assert_close(resize('table', torch.full((old, 2), 3.0), (new, 2)), torch.full((new, 2), 3.0))


def test_table_of_more_or_fewer_heads_keeps_their_order():
    table = torch.randn(9, 4)
    assert torch.equal(resize('relative_position_bias_table', table, (9, 2)), table[:, [0, 2]])
    assert torch.equal(resize('relative_position_bias_table', table[:, :2], (9, 4)), table[:, [0, 0, 1, 1]])


# What can't be

@pytest.mark.parametrize(('given', 'shape', 'expected'), [
    ((4, 3), (8, 6), True), ((4,), (4, 1), False), (None, (4,), False), ((0, 3), (4, 3), False),
    ((4, 3), (0, 3), False), ((), (), True), ((4, 3, 3, 3), (4, 3), False)])
def test_can_resize_needs_equally_many_axes_and_none_empty(given, shape, expected):
    assert can_resize(given, shape) is expected


@pytest.mark.parametrize('shape', [(8,), (8, 3, 1, 1), (0, 3)])
def test_resize_what_can_not_be_names_the_tensor_and_both_shapes(shape):
    with pytest.raises(ValueError, match=r'fc\.weight of shape \(4, 3\) can\'t be resized to \(') as raised:
        resize('fc.weight', torch.randn(4, 3), shape)
    assert str(shape) in str(raised.value)


# Gradients, types

@pytest.mark.parametrize(('name', 'old', 'new'), [
    ('weight', (3, 4), (5, 2)),
    ('weight', (3, 2, 3, 3), (2, 3, 1, 1)),
    ('weight', (2, 2, 1, 1), (3, 2, 3, 3)),
    ('weight', (2, 2, 5, 5), (2, 2, 3, 3)),
    ('bias', (3,), (7,)),
    ('table', (9, 2), (16, 4)),
    ('table', (6, 2), (11, 2)),
])
def test_gradient_reaches_the_tensor(name, old, new):
    tensor = torch.randn(old, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: resize(name, t, new), tensor)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    for name, old, new in [('weight', (4, 3, 3, 3), (6, 2, 1, 1)), ('bias', (3,), (5,)), ('table', (9, 2), (25, 4))]:
        assert resize(name, torch.randn(old, dtype=dtype), new).dtype == dtype


def test_given_tensor_is_left_alone():
    tensor = torch.randn(4, 3, 3, 3)
    before = tensor.clone()
    resize('weight', tensor, (8, 6, 1, 1)).zero_()
    assert torch.equal(tensor, before)
