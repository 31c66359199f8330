"""Blocks with norms that look at the batch, run as a whole: equal to plain autograd, unbiased, and less is kept."""
import copy
from functools import partial

import pytest
import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.resnext import Bottleneck as ResNeXtBottleneck
from timm.layers import GroupNorm
from timm.models.resnet import Bottleneck as TimmBottleneck
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rl_mmdet.analysis import count_flops, saved_bytes
from rl_mmdet.replacement import computing_layers, normed_block
from rl_mmdet.replacement.folded_block import FoldedBlock
from rl_mmdet.replacement.sampling import with_exact_part

GN = dict(norm_cfg=dict(type='GN', num_groups=2))
COEFF = '0.1.coeff'


class Biased(nn.Module):
    """Its convolutions have biases, which norms of the batch take away again and GroupNorm doesn't."""

    def __init__(self, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 4, 3, padding=1), norm(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 8, 1), norm(8)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))))


KINDS = {
    'basic': (lambda: BasicBlock(8, 8), 8),
    'bottleneck': (lambda: Bottleneck(16, 4), 16),
    'dilated': (lambda: Bottleneck(16, 4, dilation=2), 16),
    'resnext': (lambda: ResNeXtBottleneck(16, 4, groups=2, base_width=32), 16),
    'timm': (lambda: TimmBottleneck(16, 4), 16),
    'biased': (Biased, 8),
    'no affine': (lambda: Biased(partial(nn.BatchNorm2d, affine=False)), 8),
    'basic, GN': (lambda: BasicBlock(8, 8, **GN), 8),
    'bottleneck, GN': (lambda: Bottleneck(16, 4, **GN), 16),
    'timm, GN': (lambda: TimmBottleneck(16, 4, norm_layer=partial(GroupNorm, num_groups=2)), 16),
    'biased, GN': (lambda: Biased(partial(nn.GroupNorm, 2)), 8),
}
GROUPS = [kind for kind in KINDS if 'GN' in kind]


@pytest.fixture
def build(chain):
    """A chain in train mode; with ``frozen`` these norms of the replaced blocks are in eval mode all the same."""
    def net(kind: str = 'bottleneck', sample: float | None = 1, memory: str | None = None, blocks: tuple = (1,),
            frozen: tuple = (), train: bool = True, **more) -> nn.Module:
        model = chain(KINDS[kind][0], blocks, sample=sample, memory=memory, train=train, **more)
        for layer in computing_layers(model).values():
            norms = [module for module in layer.modules() if isinstance(module, _BatchNorm)]
            for index in frozen:
                norms[index].eval()
        return model
    return net


def picture(kind: str = 'bottleneck', batch: int = 2, size: tuple[int, int] = (9, 7), seed: int = 1) -> Tensor:
    return torch.randn(batch, KINDS[kind][1], *size, generator=torch.Generator().manual_seed(seed)).double()


def is_normed(model: nn.Module, image: Tensor) -> bool:
    return 'NormedBlock' in type(model[0][:2](image).grad_fn).__name__


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


# Exact gradients

@pytest.mark.parametrize('memory', [None, 'masks', 'rebuild', 'recompute'])
@pytest.mark.parametrize('kind', KINDS)
def test_sample_one_is_plain_autograd_and_moves_the_statistics_alike(build, gradients, assert_same, kind, memory):
    image = picture(kind)
    plain, model = build(kind, None), build(kind, 1, memory)
    before = state(plain)
    assert_same(gradients(model, image), gradients(plain, image))
    assert_same(state(model), after := state(plain), 1e-12)
    assert kind in GROUPS or all(not torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
@pytest.mark.parametrize('frozen', [(0,), (1,), (2,), (0, 2)])
def test_some_norms_in_eval_mode(build, gradients, assert_same, frozen, memory):
    image = picture()
    plain, model = build(sample=None, frozen=frozen), build(sample=1, memory=memory, frozen=frozen)
    before = state(plain)
    assert_same(gradients(model, image), gradients(plain, image))
    assert is_normed(model, image)
    model, after = build(sample=1, memory=memory, frozen=frozen), state(plain)
    gradients(model, image)
    assert_same(state(model), after, 1e-12)
    still = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert len(still) == 3 * len(frozen)


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
def test_statistics_over_all_steps(build, gradients, assert_same, memory):
    """``momentum=None`` is the mean over all batches, so it depends on their number."""
    plain, model = build(sample=None), build(sample=1, memory=memory)
    for each in (plain, model):
        for module in each.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = None
    for seed in (1, 2, 3):
        image = picture(seed=seed)
        assert_same(gradients(model, image), gradients(plain, image))
    assert_same(state(model), state(plain), 1e-12)
    assert model[0][1].bn1.num_batches_tracked == 3


@pytest.mark.parametrize('fusion', ['ChannelFusion', 'TransformFusion'])
def test_sample_one_with_other_fusions(build, gradients, assert_same, fusion):
    image = picture()
    assert_same(gradients(build(fusion=fusion), image), gradients(build(sample=None, fusion=fusion), image))


@pytest.mark.parametrize('kind', KINDS)
def test_the_block_is_run_as_a_whole(build, kind):
    assert is_normed(build(kind), picture(kind))


@pytest.mark.parametrize('kind', GROUPS)
def test_group_norm_in_eval_mode_is_run_as_a_whole(build, gradients, assert_same, kind):
    image, model = picture(kind), build(kind, train=False)
    assert is_normed(model, image)
    assert_same(gradients(model, image), gradients(build(kind, None, train=False), image))


@pytest.mark.parametrize('kind', ['bottleneck', 'biased', 'biased, GN'])
def test_gradients_that_are_not_sampled_are_exact(build, gradients, assert_same, kind):
    image = picture(kind)
    expected, actual = gradients(build(kind, None), image), gradients(build(kind, 1 / 4), image)
    assert not torch.allclose(actual.pop(COEFF), expected.pop(COEFF), rtol=1e-3)
    assert_same(actual, expected)


# Estimates

@pytest.mark.parametrize(('kind', 'frozen', 'memory', 'convolutions'), [
    ('basic', (), None, 2), ('basic', (), 'rebuild', 2), ('basic', (1,), None, 2), ('dilated', (), None, 3),
    ('resnext', (), 'rebuild', 3), ('biased', (), None, 2), ('biased, GN', (), None, 2),
    ('basic, GN', (), 'rebuild', 2), ('basic', (0,), 'recompute', 2)])
@pytest.mark.parametrize('rows', [5, 6])
def test_estimate_is_unbiased_over_all_parts(build, gradients, at_every_draw, mean, assert_same, kind, frozen, memory,
                                             convolutions, rows):
    """Three parts per convolution; with six rows they are equal, with five the last is smaller."""
    image = picture(kind, size=(rows, 5))
    expected = gradients(build(kind, None, frozen=frozen), image)
    draws = at_every_draw(build(kind, 1 / 3, memory, frozen=frozen), image)
    assert len(draws) == 3 ** convolutions
    for draw in draws:
        draw['out'] = draws[0]['out']  # frozen norms' statistics don't move, those of others are not used
    assert_same(mean(draws), expected)
    assert any(not torch.allclose(draw[COEFF], expected[COEFF], rtol=1e-3) for draw in draws)


@pytest.mark.parametrize('memory', ['masks', 'rebuild', 'recompute'])
@pytest.mark.parametrize('kind', [
    'basic', 'bottleneck', 'dilated', 'resnext', 'biased', 'bottleneck, GN', 'biased, GN'])
def test_one_combination_of_the_two_scalars_is_exact(build, gradients, kind, memory):
    """a·∂L/∂a + b·∂L/∂b."""
    image = picture(kind, size=(12, 7))
    plain, model = build(kind, None), build(kind, 1 / 4, memory)
    expected, coeff = gradients(plain, image), model[0][1].coeff.detach()
    for seed in range(3):
        torch.manual_seed(seed)
        actual = gradients(model, image)
        torch.testing.assert_close((coeff * actual[COEFF]).sum(), (coeff * expected[COEFF]).sum(), rtol=1e-9, atol=0)
        assert not torch.allclose(actual[COEFF], expected[COEFF], rtol=1e-3)


@pytest.mark.parametrize('kind', ['basic', 'bottleneck', 'resnext', 'bottleneck, GN'])
def test_the_exact_part_makes_the_spread_smaller(build, gradients, at_every_draw, monkeypatch, kind):
    image = picture(kind, size=(6, 5))
    expected, model = gradients(build(kind, None), image), build(kind, 1 / 3)

    def spread() -> float:
        found = torch.stack([draw[COEFF] for draw in at_every_draw(model, image)])
        return (found - expected[COEFF]).square().sum(1).mean().item()

    steered = spread()
    monkeypatch.setattr(normed_block, 'with_exact_part', lambda found, *_: found)
    assert 0 < steered < spread()


def test_the_exact_part_is_known_for_each_channel(build, gradients, monkeypatch):
    seen = []
    monkeypatch.setattr(normed_block, 'with_exact_part',
                        lambda *given: seen.append(given[2].shape) or with_exact_part(*given))
    gradients(build(sample=1 / 4), picture())
    assert seen == [(16,), (4,), (4,)]


@pytest.mark.parametrize('kind', ['basic', 'basic, GN'])
def test_few_rows(build, gradients, at_every_draw, mean, assert_same, kind, caplog):
    image, model = picture(kind, size=(3, 5)), build(kind, 1 / 8)
    draws = at_every_draw(model, image)
    assert len(draws) == 3 ** 2
    assert_same(mean(draws), gradients(build(kind, None), image))
    assert [r.message for r in caplog.records] == [
        'sample=0.125 asks for 8 parts of the rows, but a BasicBlock sees a map of 3: each is a part there']


# What it costs

@pytest.mark.parametrize('kind', ['bottleneck', 'bottleneck, GN'])
def test_saved_bytes(build, kind):
    """C = 16, w = 4, float64: the block's input, the convolutions' outputs, and its own output or a bit of each."""
    image, found = picture(kind, batch=1, size=(16, 16)).requires_grad_(), {}
    for memory in ('masks', 'rebuild', 'recompute'):
        model = build(kind, 1 / 8, memory)
        found[memory] = saved_bytes(model, lambda model=model: model[0][1](image))
    convs, wide = 256 * (4 + 4 + 16) * 8, 256 * 16 * 8
    assert found == {'masks': wide + convs + wide, 'rebuild': wide + convs + wide // 64, 'recompute': wide}
    plain = saved_bytes(model := build(kind, None), lambda: model[0][1](image))
    weights = (16 * 4 + 4 * 4 * 9 + 4 * 16) * 8
    assert plain - found['masks'] > 256 * (4 + 4) * 8 + weights


@pytest.mark.parametrize('kind', ['bottleneck', 'bottleneck, GN'])
def test_saved_bytes_in_a_chain(build, kind):
    image, found = picture(kind, batch=1, size=(16, 16)).requires_grad_(), []
    for sample, memory in ((None, None), (1 / 8, None), (1 / 8, 'rebuild'), (1 / 8, 'recompute')):
        model = build(kind, sample, memory)
        found.append(saved_bytes(model, lambda model=model: model(image)))
    plain, masks, rebuild, recompute = found
    assert rebuild == masks - 256 * 16 * 8 + 256 * 16 // 8
    assert recompute == masks - 256 * (16 + 24) * 8
    assert masks < plain


@pytest.mark.parametrize('memory', ['masks', 'rebuild', 'recompute'])
def test_no_synthesised_weight_is_kept(build, memory):
    model, image, shapes = build(sample=1 / 8, memory=memory), picture(size=(16, 16)).requires_grad_(), []
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model[0][1](image)
    assert out.requires_grad and tuple(image.shape) in shapes
    assert not {tuple(shape) for shape in model[0][1].shapes.values()} & set(shapes)


def test_flops_are_those_of_forward_input_gradient_and_the_sampled_part(build):
    image = picture(batch=1, size=(16, 16)).requires_grad_()
    block = 2 * 256 * (16 * 4 + 9 * 4 * 4 + 4 * 16)

    def step(model: nn.Module) -> int:
        model(image)  # the first time, the recipe is checked
        return count_flops(lambda: model(image).sum().backward())

    assert step(build(sample=None)) - step(build(sample=1 / 8)) == block * 7 / 8


# Between forward and backward

@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
@pytest.mark.parametrize('kind', ['bottleneck', 'bottleneck, GN'])
def test_two_forwards_before_one_backward(build, assert_same, kind, memory):
    """The running statistics of the norms that train change in between; nothing needs them."""
    images, found = [picture(kind, seed=seed) for seed in (1, 2)], []
    for model in (build(kind, None), build(kind, 1, memory)):
        sum(model(image).square().sum() for image in images).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(found[1], found[0])


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
@pytest.mark.parametrize('kind', ['bottleneck', 'bottleneck, GN'])
@pytest.mark.parametrize('before', [True, False])
def test_another_mode_before_backward_changes_nothing(build, assert_same, kind, memory, before):
    found, image = [], picture(kind)
    for after in (before, not before):
        model = build(kind, 1, memory, train=before)
        loss = model(image).square().sum()
        model.train(after)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(found[1], found[0], 1e-14)


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
@pytest.mark.parametrize('what', ['kept weight', 'coefficients', 'statistics of a norm in eval mode'])
def test_changes_in_place_before_backward_raise(build, what, memory):
    model = build(memory=memory, frozen=(1,))
    out = model(picture().requires_grad_())
    with torch.no_grad():
        {'kept weight': model[0][0].conv2.weight, 'coefficients': model[0][1].coeff,
         'statistics of a norm in eval mode': model[0][1].bn2.running_var}[what].mul_(2)
    with pytest.raises(RuntimeError, match='inplace'):
        out.sum().backward()


# Beside other things

@pytest.mark.parametrize('sample', [1, 1 / 4])
@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
@pytest.mark.parametrize('kind', ['bottleneck', 'bottleneck, GN'])
def test_autocast(build, gradients, kind, memory, sample):
    image = picture(kind).float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected = gradients(build(kind, None).float(), image)
        actual = gradients(model := build(kind, sample, memory).float(), image)
        assert is_normed(model, image)
    if sample < 1:
        coeff = model[0][1].coeff.detach()
        torch.testing.assert_close((coeff * actual.pop(COEFF)).sum(), (coeff * expected.pop(COEFF)).sum(),
                                   rtol=0.05, atol=0)
    for name, value in expected.items():
        assert (actual[name].float() - value.float()).norm() <= 0.05 * value.float().norm() + 1e-3, name


@pytest.mark.parametrize('kind', ['bottleneck', 'bottleneck, GN'])
def test_backward_outside_of_autocast_is_that_inside(build, assert_same, kind):
    image, found = picture(kind).float(), []
    for model, inside in ((build(kind).float(), True), (build(kind).float(), False)):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss = model(image).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(found[1], found[0], 1e-6)


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
def test_copies(build, gradients, assert_same, memory):
    model, image = build(memory=memory), picture()
    expected, twin = gradients(model, image), copy.deepcopy(model)
    before = state(model)
    assert_same(gradients(twin, image), expected)
    assert_same(state(model), before, 0)


# What can't be run as a whole

def test_sync_batch_norm_that_trains_is_sampled_layer_by_layer(build):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    layer = model[0][1]
    assert isinstance(layer.bn1, nn.SyncBatchNorm)
    assert not layer.recipe.local(layer.template)
    assert layer.gradient._function_for(layer, 'forward') is None
    layer.bn1.eval(), layer.bn2.eval()
    assert layer.gradient._function_for(layer, 'forward') is None
    model.eval()
    assert layer.recipe.local(layer.template)
    assert layer.gradient._function_for(layer, 'forward') is FoldedBlock


class OwnWay(nn.BatchNorm2d):
    """A BatchNorm in eval mode, and something else while it trains, as norms over all processes are."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        centered = x - x.mean((0, 2, 3), keepdim=True).detach()
        return centered * 3 * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def test_norms_that_train_in_their_own_way(build, gradients, assert_same, monkeypatch):
    monkeypatch.setitem(KINDS, 'own way', (lambda: Biased(OwnWay), 8))
    image = picture('own way')
    assert_same(gradients(build('own way'), image), gradients(build('own way', None), image))
