"""TransformFusion: the equation, the rank that its share allows, and how many numbers fusions learn."""
import math
import re

import pytest
import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.swin import SwinBlock
from timm.models.vision_transformer import Block

from rl_mmdet.replacement.fusions import Fusion, ScalarFusion, TransformFusion


def test_equation(pairs_of, start_of):
    fusion, pairs, row = TransformFusion(rank=2), pairs_of(), 0
    parameters = {name: torch.randn_like(value) for name, value in start_of(fusion).items()}
    made = fusion.fuse(parameters, pairs)
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


def test_parameters_are_named_and_counted(start_of):
    assert {name: tuple(p.shape) for name, p in start_of(TransformFusion(rank=3)).items()} == {
        'coeff': (2, 5), 'down': (10, 3), 'up': (10, 3)}
    assert list(start_of(TransformFusion(rank=0))) == ['coeff']
    assert list(start_of(TransformFusion(), {'weight': (2, 2)})) == ['coeff']  # no rank keeps to the share


@pytest.mark.parametrize(('size', 'rank'), [(4, 3), (6, 6), (1, 1), (64, 17)])
def test_starts_with_orthonormal_columns_and_zeros(start_of, size, rank):
    parameters = start_of(TransformFusion(rank=rank), {'weight': (size, 100)})
    torch.testing.assert_close(parameters['down'].T @ parameters['down'], torch.eye(rank, dtype=torch.float64))
    assert not parameters['up'].any()


def test_up_learns_at_the_first_step(pairs_of, start_of):
    parameters = {name: value.requires_grad_() for name, value in start_of(TransformFusion(rank=2)).items()}
    made = TransformFusion(rank=2).fuse(parameters, pairs_of())
    sum((tensor * torch.randn_like(tensor)).sum() for tensor in made.values()).backward()
    assert parameters['up'].grad.abs().min() > 0


@pytest.mark.parametrize(('more', 'message'), [
    (dict(rank=1.0), 'rank must be an integer of at least 0, got 1.0'),
    (dict(rank=-1), 'rank must be an integer of at least 0, got -1'),
    (dict(share=0), 'share must be a number above 0 and at most 1, got 0'),
    (dict(share='0.1'), "share must be a number above 0 and at most 1, got '0.1'"),
])
def test_wrong_arguments_raise(more, message):
    with pytest.raises(ValueError, match=f'TransformFusion: {re.escape(message)}'):
        TransformFusion(**more)


@pytest.mark.parametrize(('shapes', 'name', 'limit'), [
    ({'a.weight': (8, 8), 'b.weight': (3, 4, 3, 3)}, 'b.weight', 3),
    ({'a.weight': (4, 2), 'b.weight': (8, 4)}, 'a.weight', 4),
])
def test_rank_too_large_names_the_tensor_and_the_limit(shapes, name, limit):
    message = f'TransformFusion: rank=5, but {name} {shapes[name]} allows at most {limit}'
    with pytest.raises(ValueError, match=re.escape(message)):
        TransformFusion(rank=5).check(shapes)
    TransformFusion(rank=limit).check(shapes)
    assert TransformFusion(share=1.0).rank_for({'a.weight': (1000, 1000), 'b.weight': (2, 1000)}) == 2


# How much is learned, at the sizes of real blocks

REAL = {
    'bottleneck': lambda: Bottleneck(4 * 64, 64), 'bottleneck_512': lambda: Bottleneck(4 * 512, 512),
    'basic': lambda: BasicBlock(64, 64), 'vit': lambda: Block(192, 3, qkv_bias=True),
    'swin': lambda: SwinBlock(96, 3, 4 * 96, window_size=7),
}
REAL_SHAPES = {name: {n: tuple(p.shape) for n, p in build().named_parameters()} for name, build in REAL.items()}


def learned(fusion: Fusion, shapes: dict) -> int:
    return sum(p.numel() for p in fusion.start(shapes).values())


@pytest.mark.parametrize(('name', 'scalar', 'transform'), [
    # conv1, conv2 and conv3 have w + w + 4w output channels; six vectors of three norms
    ('bottleneck', 2, 2 * 9 + 2 * 2 * 6 * 64),
    ('basic', 2, 2 * 6 + 2 * 2 * 2 * 64),
    # qkv, proj, fc1 and fc2 have 3C + C + 4C + C; two norms and four biases have eight vectors
    ('vit', 2, 2 * 12 + 2 * 2 * 9 * 192),
    # and the table has a column per head
    ('swin', 2, 2 * 13 + 2 * 2 * 9 * 96),
])
def test_number_of_learned_parameters_is_the_closed_formula(name, scalar, transform):
    assert learned(ScalarFusion(), REAL_SHAPES[name]) == scalar
    assert learned(TransformFusion(rank=2), REAL_SHAPES[name]) == transform


@pytest.mark.parametrize('name', REAL)
def test_keeps_to_its_share_and_uses_it(name):
    for share in (0.05, 0.01):
        fusion, shapes = TransformFusion(share=share), REAL_SHAPES[name]
        made = sum(math.prod(shape) for shape in shapes.values())
        rank = fusion.rank_for(shapes)
        assert learned(fusion, shapes) <= share * made < learned(TransformFusion(rank=rank + 1), shapes)
        assert rank > 0 or share < 0.05
