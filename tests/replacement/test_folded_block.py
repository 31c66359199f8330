"""Blocks with BatchNorm in eval mode, run as a whole: equal to plain autograd, unbiased, and less is kept."""
import copy

import pytest
import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.resnext import Bottleneck as ResNeXtBottleneck
from timm.models.resnet import Bottleneck as TimmBottleneck
from torch import Tensor, nn

from rl_mmdet.analysis import count_flops, saved_bytes
from rl_mmdet.replacement import folded_block, replace_blocks_

KINDS = {
    'basic': (lambda: BasicBlock(8, 8), 8),
    'bottleneck': (lambda: Bottleneck(16, 4), 16),
    'dilated': (lambda: Bottleneck(16, 4, dilation=2), 16),
    'resnext': (lambda: ResNeXtBottleneck(16, 4, groups=2, base_width=32), 16),
    'timm': (lambda: TimmBottleneck(16, 4), 16),
}
FUSIONS = ['ScalarFusion', 'ChannelFusion', 'TransformFusion']
COEFF = '0.1.coeff'


@pytest.fixture
def build(chain):
    def net(kind: str = 'bottleneck', sample: float | None = 1, memory: str | None = None, blocks: tuple = (1,),
            **more) -> nn.Module:
        return chain(KINDS[kind][0], blocks, sample=sample, memory=memory, **more)
    return net


def picture(kind: str = 'bottleneck', batch: int = 2, size: tuple[int, int] = (9, 7)) -> Tensor:
    return torch.randn(batch, KINDS[kind][1], *size, generator=torch.Generator().manual_seed(1)).double()


def is_folded(model: nn.Module, image: Tensor) -> bool:
    return 'FoldedBlock' in type(model[0][:2](image).grad_fn).__name__


# Exact gradients

@pytest.mark.parametrize('memory', [None, 'masks', 'rebuild', 'recompute'])
@pytest.mark.parametrize('kind', KINDS)
def test_sample_one_is_plain_autograd(build, gradients, assert_same, kind, memory):
    image = picture(kind)
    expected = gradients(build(kind, None), image)
    assert_same(gradients(build(kind, 1, memory), image), expected)


@pytest.mark.parametrize('fusion', FUSIONS)
def test_sample_one_with_every_fusion(build, gradients, assert_same, fusion):
    image = picture()
    expected = gradients(build(sample=None, fusion=fusion), image)
    assert_same(gradients(build(fusion=fusion), image), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_the_block_is_run_as_a_whole(build, kind):
    assert is_folded(build(kind), picture(kind))


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
def test_gradients_that_are_not_sampled_are_exact(build, gradients, assert_same, memory):
    image = picture()
    expected, actual = (gradients(build(sample=sample, memory=memory if sample else None), image)
                        for sample in (None, 1 / 4))
    assert not torch.allclose(actual.pop(COEFF), expected.pop(COEFF), rtol=1e-3)
    assert_same(actual, expected)


# Estimates

@pytest.mark.parametrize('memory', [None, 'rebuild'])
@pytest.mark.parametrize(('kind', 'convolutions'), [('basic', 2), ('dilated', 3), ('resnext', 3)])
@pytest.mark.parametrize('rows', [8, 9])
def test_estimate_is_unbiased_over_all_parts(build, gradients, at_every_draw, mean, assert_same, kind, convolutions,
                                             memory, rows):
    """Three parts per convolution; with nine rows they are equal, with eight the last is smaller."""
    image = picture(kind, size=(rows, 5))
    expected = gradients(build(kind, None), image)
    draws = at_every_draw(build(kind, 1 / 3, memory), image)
    assert len(draws) == 3 ** convolutions
    assert_same(mean(draws), expected)
    assert any(not torch.allclose(draw[COEFF], expected[COEFF], rtol=1e-3) for draw in draws)


def combination(model: nn.Module, found: dict[str, Tensor]) -> Tensor:
    """a·∂L/∂a + b·∂L/∂b."""
    return (found[COEFF] * model[0][1].coeff.detach()).sum()


@pytest.mark.parametrize('memory', ['masks', 'rebuild', 'recompute'])
@pytest.mark.parametrize('kind', ['basic', 'bottleneck', 'dilated', 'resnext'])
def test_one_combination_of_the_two_scalars_is_exact(build, gradients, kind, memory):
    image = picture(kind, size=(12, 7))
    plain, model = build(kind, None), build(kind, 1 / 4, memory)
    expected = gradients(plain, image)
    for seed in range(3):
        torch.manual_seed(seed)
        actual = gradients(model, image)
        torch.testing.assert_close(combination(model, actual), combination(plain, expected), rtol=1e-9, atol=0)
        assert not torch.allclose(actual[COEFF], expected[COEFF], rtol=1e-3)


@pytest.mark.parametrize('memory', ['masks', 'rebuild'])
@pytest.mark.parametrize('kind', ['basic', 'bottleneck', 'dilated', 'resnext'])
def test_the_exact_part_makes_the_spread_smaller(build, gradients, at_every_draw, monkeypatch, kind, memory):
    image = picture(kind, size=(6, 5))
    expected, model = gradients(build(kind, None), image), build(kind, 1 / 3, memory)

    def spread() -> float:
        found = torch.stack([draw[COEFF] for draw in at_every_draw(model, image)])
        return (found - expected[COEFF]).square().sum(1).mean().item()

    steered = spread()
    monkeypatch.setattr(folded_block, 'with_exact_part', lambda estimated, *_: estimated)
    assert 0 < steered < spread()


def test_parts_follow_the_seed(build, gradients):
    model, image, found = build(sample=1 / 8), picture(size=(16, 4)), []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        found.append(gradients(model, image)[COEFF])
    assert torch.equal(found[0], found[1])
    assert any(not torch.equal(found[0], other) for other in found[2:])


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
def test_fewer_rows_than_parts_make_a_part_of_each_row(build, gradients, at_every_draw, mean, assert_same, memory):
    image = picture('basic', size=(3, 5))
    draws = at_every_draw(build('basic', 1 / 8, memory), image)
    assert len(draws) == 3 ** 2
    assert_same(mean(draws), gradients(build('basic', None), image))


def test_a_map_of_one_row_is_exact(build, gradients, assert_same):
    image = picture(size=(1, 5))
    assert_same(gradients(build(sample=1 / 8), image), gradients(build(sample=None), image))


def test_few_rows_are_warned_of_once_per_layer(build, gradients, caplog):
    model = build('basic', 1 / 8, blocks=(1, 2))
    gradients(model, picture('basic', size=(8, 5)))
    assert not caplog.records
    for rows in (3, 3, 2):
        gradients(model, picture('basic', size=(rows, 5)))
    said = 'asks for 8 parts of the rows, but a BasicBlock sees a map of 3: each is a part there'
    assert [record.message for record in caplog.records] == [f'sample=0.125 {said}'] * 2


# What it costs

def test_saved_bytes(build):
    """At K parts of rows: per position of the Bottleneck (C = 16, w = 4) bools and 1/K of the convolutions' inputs."""
    image = picture(batch=1, size=(16, 16)).requires_grad_()
    positions, found = 256, {}
    for memory, parts in ((None, 1), (None, 8), ('masks', 8), ('rebuild', 8)):
        model = build(sample=1 / parts, memory=memory)
        found[memory, parts] = saved_bytes(model, lambda model=model: model(image))
    plain = saved_bytes(model := build(sample=None), lambda: model(image))
    assert found['rebuild', 8] < found[None, 8] == found['masks', 8] < found[None, 1] < plain
    bools = positions * (4 + 4 + 16)
    assert found[None, 1] - found[None, 8] <= 8 * positions * (16 + 4 + 4) * 7 / 8
    assert found['rebuild', 8] < found[None, 8] - positions * (16 - 4) * 8 * 0.9 + bools


@pytest.mark.parametrize('memory', ['masks', 'rebuild', 'recompute'])
def test_saved_bytes_of_the_layer_alone(build, memory):
    """C = 16, w = 4, 16×16 positions in float64, 8 parts: strips of 2 rows see 4."""
    model, image = build(sample=1 / 8, memory=memory), picture(batch=1, size=(16, 16)).requires_grad_()
    x = 256 * 16 * 8
    conv2 = 256 * 4 * 8 // 8 * 2
    expected = {'masks': x + 256 * (4 + 4) + conv2 + 256 * 4 * 8 // 8 + x,
                'rebuild': x + 256 * 4 // 8 + conv2 + 256 * 4 * 8 + 256 * 16 // 8, 'recompute': x}
    assert saved_bytes(model, lambda: model[0][1](image)) == expected[memory]


def test_flops_are_those_of_forward_input_gradient_and_the_sampled_part(build):
    image = picture(batch=1, size=(16, 16)).requires_grad_()
    block = 2 * 256 * (16 * 4 + 9 * 4 * 4 + 4 * 16)

    def step(model: nn.Module) -> int:
        model(image)  # the first time, the recipe is checked
        return count_flops(lambda: model(image).sum().backward())

    plain = step(build(sample=None))
    sampled = step(build(sample=1 / 8))
    assert plain == 9 * block
    assert plain - sampled == block * 7 / 8


# When the block isn't what it seems, or isn't what it was

class Scaled(BasicBlock):
    """Looks like a BasicBlock and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
def test_a_block_that_computes_something_else_is_sampled_layer_by_layer(build, gradients, assert_same, monkeypatch,
                                                                        caplog, memory, train):
    monkeypatch.setitem(KINDS, 'scaled', (lambda: Scaled(8, 8), 8))
    image = picture('basic')
    expected = gradients(build('scaled', None, train=train), image)
    model = build('scaled', 1, memory, train=train)
    assert_same(gradients(model, image), expected)
    assert not is_folded(model, image)
    said = "a Scaled doesn't compute what its modules suggest: its gradient is sampled layer by layer"
    assert [record.message for record in caplog.records] == [said]


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
@pytest.mark.parametrize('what', ['kept weight', 'running statistics', 'coefficients'])
def test_changes_in_place_before_backward_raise(build, what, memory):
    model = build(memory=memory)
    out = model(picture().requires_grad_())
    with torch.no_grad():
        {'kept weight': model[0][0].conv2.weight, 'running statistics': model[0][1].bn1.running_var,
         'coefficients': model[0][1].coeff}[what].mul_(2)
    with pytest.raises(RuntimeError, match='inplace'):
        out.sum().backward()


def test_changes_in_place_raise_where_only_the_input_learns(build):
    model, image = build(), picture().requires_grad_()
    out = model[0][1](image)
    with torch.no_grad():
        model[0][0].conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match='inplace'):
        torch.autograd.grad(out.sum(), image)


# Beside other things

@pytest.mark.parametrize('sample', [1, 1 / 4])
@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
def test_autocast(build, gradients, assert_same, memory, sample):
    image = picture().float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected = gradients(build(sample=None).float(), image)
        actual = gradients(model := build(sample=sample, memory=memory).float(), image)
        assert is_folded(model, image.requires_grad_())
    if sample < 1:
        torch.testing.assert_close(combination(model, actual), combination(model, expected), rtol=0.05, atol=0)
        expected.pop(COEFF), actual.pop(COEFF)
    for name, value in expected.items():
        assert (actual[name].float() - value.float()).norm() <= 0.05 * value.float().norm() + 1e-3, name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_run_as_a_whole(build, dtype):
    model, image = build().to(dtype), picture().to(dtype)
    assert is_folded(model, image.requires_grad_())


def test_copies(build, gradients, assert_same):
    model, image = build(), picture()
    expected = gradients(model, image)
    assert_same(gradients(copy.deepcopy(model), image), expected)


def test_compiled(build, gradients, assert_same):
    image = picture()
    expected = gradients(build(), image)
    actual = gradients(torch.compile(build(), backend='aot_eager'), image)
    assert_same({name.removeprefix('_orig_mod.'): value for name, value in actual.items()}, expected)


# Settings

@pytest.mark.parametrize(('settings', 'message'), [
    (dict(sample=0), r'sample must be above 0 and at most 1, or None \(plain autograd\), got 0'),
    (dict(sample=1.5), 'sample must be above 0'),
    (dict(sample=True), 'sample must be above 0'),
    (dict(sample='1/8'), 'sample must be above 0'),
    (dict(mode='coupled', sample=0.5), "sample goes with mode='detached' only"),
])
def test_bad_settings(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**dict(dict(sample=1), **settings))


def test_the_report_says_that_the_block_is_sampled():
    model = nn.Sequential(nn.Sequential(*(BasicBlock(4, 4) for _ in range(3))))
    report = replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2), gradient=dict(sample=0.5)))
    assert '0.1 (BasicBlock): replaced, from 0.0 and 0.2; learns 2, sampled\n' in str(report)
    assert report.rows[1].way == 'block'
