"""Fusions: with what. The equation, the start values, and the fit to a removed block's weights."""
import math
import re

import pytest
import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.swin import SwinBlock
from timm.models.vision_transformer import Block

from rl_mmdet.replacement.fusions import ChannelFusion, Fusion, ScalarFusion, TransformFusion

A, B = 0.7, -1.3


@pytest.fixture
def pairs() -> dict:
    """A convolution that both neighbours have, a bias, and one tensor of either neighbour alone."""
    return {
        'conv': (torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)),
        'bias': (torch.randn(4), torch.randn(4)),
        'only_after': (None, torch.randn(5, 2)),
        'only_before': (torch.randn(2, 5), None),
    }


def planted(pairs: dict) -> dict:
    """Weights that a·before + b·after gives, a missing side counting as nothing."""
    return {name: A * (0 if before is None else before) + B * (0 if after is None else after)
            for name, (before, after) in pairs.items()}


def test_fuse_both_neighbours_is_the_weighted_sum(pairs):
    made = ScalarFusion().fuse({'coeff': torch.tensor([A, B])}, pairs)
    torch.testing.assert_close(made['conv'], A * pairs['conv'][0] + B * pairs['conv'][1])


def test_fuse_only_the_neighbour_after_is_scaled_by_b(pairs):
    made = ScalarFusion().fuse({'coeff': torch.tensor([A, B])}, pairs)
    torch.testing.assert_close(made['only_after'], B * pairs['only_after'][1])


def test_fuse_only_the_neighbour_before_is_scaled_by_a(pairs):
    made = ScalarFusion().fuse({'coeff': torch.tensor([A, B])}, pairs)
    torch.testing.assert_close(made['only_before'], A * pairs['only_before'][0])


def test_new_parameters_default_is_one_half_each():
    coeff = ScalarFusion().new_parameters({}, torch.device('cpu'), torch.float32)['coeff']
    assert coeff.tolist() == [0.5, 0.5]


def test_new_parameters_init_dtype_and_learning():
    parameters = ScalarFusion(init=0.25).new_parameters({}, torch.device('cpu'), torch.float64)
    assert list(parameters) == ['coeff']
    assert parameters['coeff'].tolist() == [0.25, 0.25]
    assert parameters['coeff'].dtype == torch.float64
    assert parameters['coeff'].requires_grad


@pytest.mark.parametrize('init', [float('nan'), float('inf'), '0.5', True, None])
def test_scalar_fusion_wrong_init_raises(init):
    with pytest.raises(ValueError, match='init must be a finite number, got'):
        ScalarFusion(init=init)


def test_scalar_fusion_unknown_pretrained_names_the_allowed():
    with pytest.raises(ValueError, match="unknown pretrained='median'; allowed: average, least_squares"):
        ScalarFusion(pretrained='median')


def test_fit_average_ignores_the_removed_weights(pairs):
    fit = ScalarFusion(init=0.4, pretrained='average').fit(planted(pairs), pairs)
    torch.testing.assert_close(fit.parameters['coeff'], torch.tensor([0.4, 0.4]))


def test_fit_average_residual_is_the_relative_distance():
    pairs = {'w': (torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]))}
    fit = ScalarFusion().fit({'w': torch.tensor([1.0, 3.0])}, pairs)  # made: (1, 1)
    assert fit.residual == pytest.approx((4 / 10) ** 0.5)


def test_fit_least_squares_recovers_planted_coefficients(pairs):
    doubles = {n: tuple(None if t is None else t.double() for t in pair) for n, pair in pairs.items()}
    fit = ScalarFusion(pretrained='least_squares').fit(planted(doubles), doubles)
    torch.testing.assert_close(fit.parameters['coeff'], torch.tensor([A, B], dtype=torch.float64),
                               rtol=1e-12, atol=1e-12)


def test_fit_least_squares_planted_residual_is_zero(pairs):
    assert ScalarFusion(pretrained='least_squares').fit(planted(pairs), pairs).residual < 1e-6


def test_fit_least_squares_noisy_weights_equal_lstsq(pairs):
    targets = {name: value + torch.randn_like(value) for name, value in planted(pairs).items()}
    columns = [torch.cat([(torch.zeros_like(targets[n]) if pair[side] is None else pair[side]).flatten()
                          for n, pair in pairs.items()]) for side in (0, 1)]
    expected = torch.linalg.lstsq(torch.stack(columns, 1).double(),
                                  torch.cat([t.flatten() for t in targets.values()]).double()[:, None])
    fit = ScalarFusion(pretrained='least_squares').fit(targets, pairs)
    torch.testing.assert_close(fit.parameters['coeff'].double(), expected.solution[:, 0],
                               rtol=1e-5, atol=1e-6)


def test_fit_least_squares_is_no_worse_than_average(pairs):
    targets = {name: value + torch.randn_like(value) for name, value in planted(pairs).items()}
    best = ScalarFusion(pretrained='least_squares').fit(targets, pairs).residual
    assert best < ScalarFusion(pretrained='average').fit(targets, pairs).residual


def test_fit_least_squares_equal_neighbours_share_the_weight():
    same = torch.randn(4, 4)
    fit = ScalarFusion(pretrained='least_squares').fit({'w': 3 * same}, {'w': (same, same)})
    torch.testing.assert_close(fit.parameters['coeff'], torch.tensor([1.5, 1.5]))


def test_fit_least_squares_zero_neighbours_is_finite():
    pairs = {'w': (torch.zeros(3), torch.zeros(3))}
    fit = ScalarFusion(pretrained='least_squares').fit({'w': torch.ones(3)}, pairs)
    assert fit.parameters['coeff'].tolist() == [0.0, 0.0]
    assert fit.residual == 1.0


def test_fit_keeps_the_weights_dtype(pairs):
    halves = {n: tuple(None if t is None else t.half() for t in pair) for n, pair in pairs.items()}
    targets = {name: value.half() for name, value in planted(pairs).items()}
    fit = ScalarFusion(pretrained='least_squares').fit(targets, halves)
    assert fit.parameters['coeff'].dtype == torch.float16


def test_fit_does_not_change_its_inputs(pairs):
    targets = planted(pairs)
    before = {name: value.clone() for name, value in targets.items()}
    ScalarFusion(pretrained='least_squares').fit(targets, pairs)
    assert all(torch.equal(targets[name], before[name]) for name in targets)


# What all fusions share

FUSIONS = [ScalarFusion, ChannelFusion, TransformFusion]
SHAPES = {'conv.weight': (4, 3, 3, 3), 'norm.weight': (4,), 'fc.weight': (6, 4), 'fc.bias': (6,), 'table': (9, 2)}
"""Of a small block with every kind of tensor."""

every_fusion = pytest.mark.parametrize('fusion', FUSIONS)


def sides(seed: int = 0, shapes: dict = SHAPES, one_sided: bool = True) -> dict:
    """Neighbours' tensors in float64; the fully connected layer has only one before, its bias only one after it."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
            for name, shape in shapes.items()}
    if one_sided:
        made['fc.weight'] = (made['fc.weight'][0], None)
        made['fc.bias'] = (None, made['fc.bias'][1])
    return made


def new(fusion: Fusion, shapes: dict = SHAPES) -> dict:
    """The parameters that the fusion starts from, in float64."""
    return {name: p.detach() for name, p in fusion.new_parameters(shapes, torch.device('cpu'), torch.float64).items()}


def average(pairs: dict) -> dict:
    """Half of what the neighbours have together."""
    return {name: sum(side for side in pair if side is not None) / 2 for name, pair in pairs.items()}


@every_fusion
def test_start_is_the_average_of_the_neighbours(fusion):
    pairs = sides()
    made = fusion().fuse(new(fusion()), pairs)
    assert list(made) == list(pairs)
    for name, expected in average(pairs).items():
        torch.testing.assert_close(made[name], expected)


@every_fusion
def test_start_is_scaled_by_init(fusion):
    made = fusion(init=-1.5).fuse(new(fusion(init=-1.5)), sides())
    for name, expected in average(sides()).items():
        torch.testing.assert_close(made[name], -3 * expected)


@every_fusion
def test_new_parameters_learn_and_have_the_dtype(fusion):
    parameters = fusion().new_parameters(SHAPES, torch.device('cpu'), torch.bfloat16)
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in parameters.values())


@every_fusion
@pytest.mark.parametrize('one_sided', [True, False])
def test_gradients_of_parameters_and_neighbours(fusion, one_sided):
    fusion = fusion(**({'rank': 1} if fusion is TransformFusion else {}))
    shapes = {'conv.weight': (2, 2, 3, 1), 'norm.weight': (2,), 'fc.weight': (3, 2), 'fc.bias': (3,), 'table': (4, 2)}
    pairs = sides(shapes=shapes, one_sided=one_sided)
    keys = list(new(fusion, shapes))
    given = [torch.randn(value.shape, dtype=torch.float64) for value in new(fusion, shapes).values()]
    places = [(name, side) for name in pairs for side in (0, 1) if pairs[name][side] is not None]
    given += [pairs[name][side] for name, side in places]

    def fused(*values):
        of = dict(zip(places, values[len(keys):], strict=True))
        parameters = dict(zip(keys, values, strict=False))
        return tuple(fusion.fuse(parameters, {n: (of.get((n, 0)), of.get((n, 1))) for n in pairs}).values())

    assert torch.autograd.gradcheck(fused, [value.requires_grad_() for value in given])


@every_fusion
@pytest.mark.parametrize('adapt', [1, 'yes', None])
def test_wrong_adapt_raises(fusion, adapt):
    with pytest.raises(TypeError, match=f'{fusion.__name__}: adapt must be True or False, got {adapt!r}'):
        fusion(adapt=adapt)


@pytest.mark.parametrize('fusion', [ChannelFusion, TransformFusion])
def test_wrong_init_and_pretrained_raise_with_the_fusions_name(fusion):
    with pytest.raises(ValueError, match=f"{fusion.__name__}: init must be a finite number, got 'a'"):
        fusion(init='a')
    with pytest.raises(ValueError, match=f"{fusion.__name__}: unknown pretrained='mean'; allowed: average, least_sq"):
        fusion(pretrained='mean')


# Channel by channel

def by_hand(coeff: torch.Tensor, pairs: dict) -> dict:
    """Channel by channel: a pair per output channel of a weight, per head of a table, per vector as a whole."""
    made, column = {}, 0
    for name, (before, after) in pairs.items():
        like = before if before is not None else after
        made[name] = torch.zeros_like(like)
        vector, table = like.ndim == 1, name == 'table'
        for c in range(1 if vector else like.shape[-1] if table else like.shape[0]):
            at = ... if vector else (slice(None), c) if table else c
            for factor, side in zip(coeff[:, column].tolist(), (before, after), strict=True):
                if side is not None:
                    made[name][at] += factor * side[at]
            column += 1
    assert column == coeff.shape[1]
    return made


@pytest.mark.parametrize('one_sided', [True, False])
def test_channel_fusion_equation(one_sided):
    pairs = sides(one_sided=one_sided)
    coeff = torch.randn(2, 4 + 1 + 6 + 1 + 2, dtype=torch.float64)
    made = ChannelFusion().fuse({'coeff': coeff}, pairs)
    for name, expected in by_hand(coeff, pairs).items():
        torch.testing.assert_close(made[name], expected)


def test_channel_fusion_coefficients_are_named_and_counted():
    assert {name: tuple(p.shape) for name, p in new(ChannelFusion()).items()} == {'coeff': (2, 14)}


@pytest.mark.parametrize('one_sided', [True, False])
def test_channel_fusion_least_squares_recovers_planted_coefficients(one_sided):
    pairs, coeff = sides(one_sided=one_sided), torch.randn(2, 14, dtype=torch.float64)
    if one_sided:  # what no tensor is there for comes out as 0
        coeff[1, 5:11], coeff[0, 11] = 0, 0
    fit = ChannelFusion(pretrained='least_squares').fit(by_hand(coeff, pairs), pairs)
    torch.testing.assert_close(fit.parameters['coeff'], coeff, rtol=1e-10, atol=1e-10)
    assert fit.residual < 1e-10


def test_channel_fusion_least_squares_with_noise_equals_lstsq_channel_by_channel():
    pairs = sides(one_sided=False)
    targets = {name: torch.randn_like(pair[0]) for name, pair in pairs.items()}
    coeff = ChannelFusion(pretrained='least_squares').fit(targets, pairs).parameters['coeff']
    channel = torch.stack([side[2].flatten() for side in pairs['conv.weight']], 1)
    expected = torch.linalg.lstsq(channel, targets['conv.weight'][2].flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(coeff[:, 2], expected)
    head = torch.stack([side[:, 1] for side in pairs['table']], 1)
    torch.testing.assert_close(coeff[:, 13], torch.linalg.lstsq(head, targets['table'][:, 1:]).solution[:, 0])


# A transformation

def test_transform_fusion_equation():
    fusion, pairs = TransformFusion(rank=2), sides()
    parameters = {name: torch.randn_like(value) for name, value in new(fusion).items()}
    made = fusion.fuse(parameters, pairs)
    row = 0
    for column, (name, (before, after)) in enumerate(pairs.items()):
        a, b = parameters['coeff'][:, column].tolist()
        expected = sum(factor * side for factor, side in ((a, before), (b, after)) if side is not None)
        if name.endswith('weight') and expected.ndim > 1:
            o = len(expected)
            up, down = parameters['up'][row:row + o], parameters['down'][row:row + o]
            row += o
            matrix = torch.eye(o, dtype=torch.float64) + sum(torch.outer(up[:, r], down[:, r]) for r in range(2))
            expected = torch.einsum('oc,c...->o...', matrix, expected)
        torch.testing.assert_close(made[name], expected)
    assert row == len(parameters['up']) == len(parameters['down'])


def test_transform_fusion_parameters_are_named_and_counted():
    assert {name: tuple(p.shape) for name, p in new(TransformFusion(rank=3)).items()} == {
        'coeff': (2, 5), 'down': (10, 3), 'up': (10, 3)}


def test_transform_fusion_of_rank_zero_is_the_mixture_alone():
    fusion, pairs = TransformFusion(rank=0), sides()
    assert list(new(fusion)) == ['coeff']
    coeff = torch.randn(2, 5, dtype=torch.float64)
    made = fusion.fuse({'coeff': coeff}, pairs)
    torch.testing.assert_close(made['table'], coeff[0, 4] * pairs['table'][0] + coeff[1, 4] * pairs['table'][1])


@pytest.mark.parametrize(('size', 'rank'), [(4, 1), (4, 3), (6, 6), (1, 1), (64, 17)])
def test_transform_fusion_starts_with_orthonormal_columns(size, rank):
    parameters = new(TransformFusion(rank=rank), {'weight': (size, 100)})
    torch.testing.assert_close(parameters['down'].T @ parameters['down'], torch.eye(rank, dtype=torch.float64))
    assert not parameters['up'].any()


def test_transform_fusion_up_learns_at_the_first_step():
    fusion, pairs = TransformFusion(rank=2), sides()
    parameters = {name: value.requires_grad_() for name, value in new(fusion).items()}
    made = fusion.fuse(parameters, pairs)
    sum((tensor * torch.randn_like(tensor)).sum() for tensor in made.values()).backward()
    assert parameters['up'].grad.abs().min() > 0


def test_transform_fusion_least_squares_recovers_planted_mixtures():
    pairs, coeff = sides(), torch.randn(2, 5, dtype=torch.float64)
    coeff[1, 2] = coeff[0, 3] = 0  # no tensor there
    targets = {name: sum(f * side for f, side in zip(coeff[:, i].tolist(), pair, strict=True) if side is not None)
               for i, (name, pair) in enumerate(pairs.items())}
    fit = TransformFusion(rank=2, pretrained='least_squares').fit(targets, pairs)
    torch.testing.assert_close(fit.parameters['coeff'], coeff, rtol=1e-10, atol=1e-10)
    assert fit.residual < 1e-10
    assert not fit.parameters['up'].any()
    assert tuple(fit.parameters['down'].shape) == (10, 2)


@pytest.mark.parametrize('fusion', [ChannelFusion, TransformFusion])
def test_fit_of_some_tensors_keeps_the_start_of_the_others(fusion):
    pairs = sides(one_sided=False)
    fusion = fusion(init=0.3, pretrained='least_squares')
    known = {name: pairs[name] for name in ('norm.weight', 'table')}
    fit = fusion.fit({name: 2 * before - after for name, (before, after) in known.items()}, known, SHAPES)
    start = new(fusion)
    assert {name: p.shape for name, p in fit.parameters.items()} == {name: p.shape for name, p in start.items()}
    columns = [4, 12, 13] if isinstance(fusion, ChannelFusion) else [1, 4]
    for column in range(fit.parameters['coeff'].shape[1]):
        expected = [2.0, -1.0] if column in columns else [0.3, 0.3]
        assert fit.parameters['coeff'][:, column].tolist() == pytest.approx(expected)


def test_fit_of_some_tensors_with_one_pair_is_theirs():
    pairs = sides(one_sided=False)
    known = {'table': pairs['table']}
    fit = ScalarFusion(pretrained='least_squares').fit({'table': 2 * pairs['table'][0]}, known, SHAPES)
    assert fit.parameters['coeff'].tolist() == pytest.approx([2.0, 0.0], abs=1e-12)


@pytest.mark.parametrize(('more', 'error', 'message'), [
    (dict(rank=1.0), TypeError, 'rank must be an integer or None, got 1.0'),
    (dict(rank=True), TypeError, 'rank must be an integer or None, got True'),
    (dict(rank='2'), TypeError, "rank must be an integer or None, got '2'"),
    (dict(rank=-1), ValueError, 'rank must be at least 0, got -1'),
    (dict(share=0), ValueError, 'share must be above 0 and at most 1, got 0'),
    (dict(share=1.5), ValueError, 'share must be above 0 and at most 1, got 1.5'),
    (dict(share='0.1'), ValueError, "share must be above 0 and at most 1, got '0.1'"),
    (dict(share=True), ValueError, 'share must be above 0 and at most 1, got True'),
    (dict(share=float('nan')), ValueError, 'share must be above 0 and at most 1, got nan'),
])
def test_transform_fusion_wrong_arguments_raise(more, error, message):
    with pytest.raises(error, match=f'TransformFusion: {re.escape(message)}'):
        TransformFusion(**more)


@pytest.mark.parametrize(('shapes', 'name', 'limit'), [
    ({'a.weight': (8, 8), 'b.weight': (3, 4, 3, 3)}, 'b.weight', 3),
    ({'a.weight': (8, 2), 'b.weight': (8, 4)}, 'a.weight', 2),
])
def test_transform_fusion_rank_too_large_names_the_tensor_and_the_limit(shapes, name, limit):
    message = f'TransformFusion: rank=5, but {name} {shapes[name]} allows at most {limit}'
    with pytest.raises(ValueError, match=re.escape(message)):
        TransformFusion(rank=5).check(shapes)
    TransformFusion(rank=limit).check(shapes)


# How much is learned, at the sizes of real blocks

def shapes_of(block: torch.nn.Module) -> dict:
    return {name: tuple(p.shape) for name, p in block.named_parameters()}


def bottleneck(width: int) -> dict:
    return shapes_of(Bottleneck(4 * width, width))


def basic(width: int) -> dict:
    return shapes_of(BasicBlock(width, width))


def vit(channels: int, heads: int) -> dict:
    return shapes_of(Block(channels, heads, qkv_bias=True))


def swin(channels: int, heads: int) -> dict:
    return shapes_of(SwinBlock(channels, heads, 4 * channels, window_size=7))


def learned(fusion: Fusion, shapes: dict) -> int:
    with torch.device('meta'):
        return sum(p.numel() for p in fusion.new_parameters(shapes, torch.device('meta'), torch.float32).values())


@pytest.mark.parametrize(('shapes', 'scalar', 'channel', 'transform'), [
    # conv1, conv2 and conv3 have w + w + 4w output channels; six vectors of three norms
    (bottleneck(64), 2, 2 * (6 * 64 + 6), 2 * 9 + 2 * 2 * 6 * 64),
    (bottleneck(512), 2, 2 * (6 * 512 + 6), 2 * 9 + 2 * 2 * 6 * 512),
    (basic(64), 2, 2 * (2 * 64 + 4), 2 * 6 + 2 * 2 * 2 * 64),
    # qkv, proj, fc1 and fc2 have 3C + C + 4C + C; two norms and four biases have eight vectors
    (vit(192, 3), 2, 2 * (9 * 192 + 8), 2 * 12 + 2 * 2 * 9 * 192),
    # and the table has a column per head
    (swin(96, 3), 2, 2 * (9 * 96 + 8 + 3), 2 * 13 + 2 * 2 * 9 * 96),
], ids=['bottleneck', 'bottleneck_512', 'basic', 'vit', 'swin'])
def test_number_of_learned_parameters_is_the_closed_formula(shapes, scalar, channel, transform):
    assert learned(ScalarFusion(), shapes) == scalar
    assert learned(ChannelFusion(), shapes) == channel
    assert learned(TransformFusion(rank=2), shapes) == transform


REAL = {
    **{f'r50_{width}': bottleneck(width) for width in (64, 128, 256, 512)},
    **{f'r18_{width}': basic(width) for width in (64, 128, 256, 512)},
    **{f'swin_{channels}': swin(channels, channels // 32) for channels in (96, 192, 384, 768)},
    'vit_b': vit(768, 12), 'vit_ti': vit(192, 3),
}


@pytest.mark.parametrize('shapes', REAL.values(), ids=REAL)
@pytest.mark.parametrize('share', [0.05, 0.01])
def test_transform_fusion_keeps_to_its_share_and_uses_it(shapes, share):
    fusion = TransformFusion(share=share)
    made = sum(math.prod(shape) for shape in shapes.values())
    rank = fusion.rank_for(shapes)
    assert learned(fusion, shapes) <= share * made
    assert learned(TransformFusion(rank=rank + 1), shapes) > share * made
    assert rank > 0 or share < 0.05


def test_transform_fusion_where_no_rank_fits_is_the_mixture_alone():
    assert list(new(TransformFusion(), {'weight': (2, 2)})) == ['coeff']


def test_transform_fusion_rank_by_share_is_never_more_than_the_smallest_weight_allows():
    assert TransformFusion(share=1.0).rank_for({'a.weight': (1000, 1000), 'b.weight': (1000, 2)}) == 2
