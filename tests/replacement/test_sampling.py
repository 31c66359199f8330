"""Parts of a convolution's positions: together they give the exact gradient, and each keeps no more than its rows."""
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl_mmdet.replacement.sampling import (
    STRIP,
    ConvSettings,
    Part,
    estimate,
    inner,
    input_gradient,
    pick_part,
    positive,
    to_bits,
    with_exact_part,
)

ROWS = (1, 2, 3, 5, 8, 9, 17)
PARTS = (1, 2, 3, 8)


def square(size: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
           ) -> tuple[tuple[int, int], ConvSettings]:
    return (size, size), ConvSettings((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)


def fits(rows: int, kernel: tuple[int, int], conv: ConvSettings) -> bool:
    return rows + 2 * conv.padding[0] > conv.dilation[0] * (kernel[0] - 1)


def case(rows: int, kernel: tuple[int, int], conv: ConvSettings, columns: int = 10
         ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, gradient of the output, and autograd's gradients of input and weight."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
                 for shape in ((2, 4, rows, columns), (6, 4 // conv.groups, *kernel)))
    out = conv.run(x, weight, None)
    assert out.shape == conv.output_shape(x.shape, weight.shape)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return x.detach(), weight.detach(), grad, *torch.autograd.grad(out, (x, weight), grad)


def every(part: Part) -> list[Part]:
    """The parts that could have been drawn in place of this one."""
    return [replace(part, first=first) for first in range(part.count)]


def estimates(x: Tensor, weight: Tensor, grad: Tensor, conv: ConvSettings, parts: int) -> list[Tensor]:
    size = weight.shape[2]
    return [estimate(grad, part.of_input(x, size, conv), weight, conv, part)
            for part in every(pick_part(grad.shape[2], size, conv, parts))]


def assert_mean_is(expected: Tensor, found: list[Tensor]) -> None:
    assert (sum(found) / len(found) - expected).abs().max() <= 1e-12 * max(1, expected.abs().max())


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('padding', [0, 1, 2])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [1, 3, 5])
def test_mean_over_all_parts_is_the_weight_gradient(size, stride, padding, dilation, groups):
    kernel, conv = square(size, stride, padding, dilation, groups)
    fitting = [rows for rows in ROWS if fits(rows, kernel, conv)]
    assert fitting
    for rows, parts in itertools.product(fitting, PARTS):
        x, weight, grad, _, expected = case(rows, kernel, conv)
        found = estimates(x, weight, grad, conv, parts)
        assert 1 <= len(found) <= min(parts, grad.shape[2])
        assert_mean_is(expected, found)


@pytest.mark.parametrize(('kernel', 'conv'), [
    ((3, 1), ConvSettings((1, 2), (1, 0), (2, 1), 1)),
    ((1, 3), ConvSettings((2, 1), (0, 1), (1, 2), 1)),
    ((1, 5), ConvSettings((2, 2), (1, 2), (1, 1), 2)),
    ((5, 3), ConvSettings((2, 1), (2, 0), (1, 2), 1)),
])
def test_height_and_width_are_not_confused(kernel, conv):
    for rows, parts in itertools.product((5, 9), PARTS):
        x, weight, grad, x_grad, expected = case(rows, kernel, conv, columns=11)
        assert_mean_is(expected, estimates(x, weight, grad, conv, parts))
        assert_mean_is(x_grad, [input_gradient(grad, weight, x.shape, conv)])


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [1, 3])
def test_input_gradient_is_autograds(size, stride, groups):
    kernel, conv = square(size, stride, size // 2, groups=groups)
    x, weight, grad, expected, _ = case(9, kernel, conv)
    assert_mean_is(expected, [input_gradient(grad, weight, x.shape, conv)])


def test_parts_are_taken_of_other_memory_layouts():
    kernel, conv = square(3, padding=1)
    x, weight, grad, _, expected = case(9, kernel, conv)
    x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    assert_mean_is(expected, estimates(x, weight, grad, conv, 3))


@pytest.mark.parametrize('size', [1, 3])
def test_parts_do_not_overlap_and_cover_all_rows(size):
    _, conv = square(size, padding=size // 2)
    for rows, parts in itertools.product(ROWS, PARTS):
        of = torch.arange(1., rows + 1).view(1, 1, rows, 1)
        seen = torch.cat([part.of_output(of).flatten() for part in every(pick_part(rows, size, conv, parts))])
        assert seen[seen > 0].sort().values.tolist() == of.flatten().tolist()


def test_rows_of_a_part_are_spread_over_the_map():
    _, conv = square(1)
    part = replace(pick_part(16, 1, conv, 4), first=1)
    assert part.of_output(torch.arange(16.).view(1, 1, 16, 1)).flatten().tolist() == [1, 5, 9, 13]
    _, conv = square(3, padding=1)
    assert list(replace(pick_part(64, 3, conv, 4), first=1).strips()) == [4, 20, 36, 52]


# What is kept

@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('parts', [2, 3, 8])
def test_a_1x1_convolution_keeps_one_row_for_every_one_it_takes(stride, parts):
    kernel, conv = square(1, stride)
    x, weight, grad, *_ = case(48, kernel, conv)
    for part in every(pick_part(grad.shape[2], 1, conv, parts)):
        assert part.of_input(x, 1, conv).shape == (2, 4, 48 // stride // parts, 10)


@pytest.mark.parametrize(('rows', 'parts', 'strip'), [(64, 8, 4), (64, 4, 4), (24, 8, 3), (16, 8, 2), (8, 8, 1)])
@pytest.mark.parametrize(('size', 'dilation'), [(3, 1), (3, 2), (5, 1)])
def test_other_convolutions_keep_strips_and_their_halo(rows, parts, strip, size, dilation):
    halo = dilation * (size - 1)
    _, conv = square(size, padding=halo // 2, dilation=dilation)
    assert strip <= STRIP
    for part in every(pick_part(rows, size, conv, parts)):
        kept = part.of_input(torch.ones(1, 1, rows, 3), size, conv)
        assert kept.shape[0] * kept.shape[2] == rows / parts * (strip + halo) / strip


@pytest.mark.parametrize('size', [1, 3])
def test_a_part_does_not_hold_on_to_the_whole_map(size):
    _, conv = square(size, padding=size // 2)
    x = torch.ones(1, 1, 32, 3)
    kept = pick_part(32, size, conv, 4).of_input(x, size, conv)
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size() < x.untyped_storage().nbytes()


# Drawing

def test_every_part_is_drawn_and_by_torchs_generator():
    _, conv = square(3, padding=1)
    torch.manual_seed(3)
    drawn = [pick_part(16, 3, conv, 4).first for _ in range(60)]
    assert set(drawn) == {0, 1, 2, 3}
    torch.manual_seed(3)
    assert drawn == [pick_part(16, 3, conv, 4).first for _ in range(60)]


@pytest.mark.parametrize(('rows', 'parts'), [(16, 1), (1, 8)])
def test_nothing_is_drawn_where_there_is_one_part(rows, parts):
    state = torch.get_rng_state()
    assert pick_part(rows, 3, square(3, padding=1)[1], parts) == Part(rows, rows, 0, 1)
    assert torch.equal(torch.get_rng_state(), state)


# The exact part

@pytest.fixture(params=['whole', 'per channel'])
def axes(request) -> tuple[int, ...]:
    """Those that an inner product sums over."""
    return (0, 1, 2, 3) if request.param == 'whole' else (1, 2, 3)


def test_exact_part_is_as_given(axes):
    weight, found = torch.randn(2, 6, 4, 3, 3).double()
    exact = torch.randn(6).double() if axes == (1, 2, 3) else torch.tensor(3.).double()
    steered = with_exact_part(found, weight, exact)
    torch.testing.assert_close(inner(steered, weight, axes), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((steered * weight).sum(), exact.sum(), rtol=1e-12, atol=1e-12)


def test_exact_part_changes_nothing_but_the_component_along_the_weight(axes):
    weight, found, other = torch.randn(3, 6, 4, 3, 3).double()
    along = inner(other, weight, axes) / inner(weight, weight, axes)
    across = other - weight * (along.view(-1, 1, 1, 1) if axes == (1, 2, 3) else along)
    exact = torch.randn(6).double() if axes == (1, 2, 3) else torch.tensor(3.).double()
    change = with_exact_part(found, weight, exact) - found
    assert (change * across).sum().abs() < 1e-11 < change.norm()


def test_mean_over_all_parts_stays_with_the_exact_part(axes):
    kernel, conv = square(3, padding=1)
    x, weight, grad, _, expected = case(9, kernel, conv)
    found = estimates(x, weight, grad, conv, 3)
    steered = [with_exact_part(each, weight, inner(expected, weight, axes)) for each in found]
    assert_mean_is(expected, steered)
    assert not torch.allclose(steered[0], found[0])
    spread, before = (sum((each - expected).square().sum() for each in all) for all in (steered, found))
    assert spread < before


@pytest.mark.parametrize('zero', ['channel', 'all'])
def test_zero_weights_keep_the_estimate(axes, zero):
    weight, found = torch.randn(2, 6, 4, 3, 3).double()
    weight[1 if zero == 'channel' else slice(None)] = 0
    exact = inner(weight, torch.randn_like(weight), axes)
    steered = with_exact_part(found, weight, exact)
    assert steered.isfinite().all()
    assert torch.equal(steered[1], found[1])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_exact_part_of_half_precision_is_taken_in_float32(axes, dtype):
    weight, found = torch.randn(2, 6, 4, 3, 3).to(dtype)
    exact = torch.randn(6) if axes == (1, 2, 3) else torch.tensor(3.)
    steered = with_exact_part(found, weight, exact)
    assert steered.dtype == torch.float32
    torch.testing.assert_close((steered * weight.float()).sum(axes), exact, rtol=1e-5, atol=1e-5)


def test_inner_sums_half_precision_in_float32():
    a = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)
    assert inner(a, a, (0, 2, 3)).tolist() == [4096]
    assert inner(a, a, (0, 2, 3)).dtype == torch.float32
    assert inner(a.double(), a.double(), (0, 2, 3)).dtype == torch.float64


# Masks

@pytest.mark.parametrize('shape', [(1,), (8,), (3, 5), (2, 3, 5, 7)])
def test_bits_hold_bools(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    bits = to_bits(mask)
    assert (bits.dtype, bits.numel()) == (torch.uint8, -(-mask.numel() // 8))
    assert torch.equal(positive(bits, mask.shape), mask)


def test_bits_hold_bools_of_other_memory_layouts():
    mask = (torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.5).to(
        memory_format=torch.channels_last)
    back = positive(to_bits(mask), mask.shape)
    assert torch.equal(back, mask)
    assert back.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('kernel', [1, 3])
def test_parts_of_maps_with_the_channels_last_have_them_last(kernel):
    h, conv = torch.randn(2, 3, 16, 5).to(memory_format=torch.channels_last), ConvSettings((1, 1), (kernel // 2,) * 2,
                                                                                         (1, 1), 1)
    part = pick_part(16, kernel, conv, 4)
    for found in (part.of_input(h, kernel, conv), part.of_output(h)):
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_positive_takes_outputs_and_bools_as_well():
    out = torch.relu(torch.randn(2, 3, 5))
    assert torch.equal(positive(out, out.shape), out > 0)
    assert torch.equal(positive(out > 0, out.shape), out > 0)
