"""Any block, sampled layer by layer: equal to plain autograd, unbiased, and neither weights nor inputs are kept."""
import copy
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones.res2net import Bottle2neck
from mmdet.models.backbones.resnet import Bottleneck
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from rl_mmdet.analysis import count_flops, saved_bytes
from rl_mmdet.models import RLSwin
from rl_mmdet.replacement import computing_layers, replace_blocks_, sampled_layers
from rl_mmdet.replacement import gradients as gradients_module

COEFF = '0.1.coeff'


class Flat(nn.Module):
    """On tokens without a map or a batch, and without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Odd(nn.Module):
    """Convolutions called in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.same = nn.Conv2d(8, 6, 3), nn.Conv2d(6, 6, 3, padding='same')
        self.point, self.up = nn.Conv2d(6, 6, 1, stride=2), nn.ConvTranspose2d(6, 8, 4, stride=4)
        self.rim, self.mean = nn.Conv2d(8, 8, 3, padding=1, padding_mode='reflect'), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv2d(input=x, weight=self.down.weight, bias=self.down.bias, stride=(2, 2), padding=1)
        out = F.interpolate(self.up(self.point(F.silu(self.same(F.gelu(input=out)), inplace=True))), x.shape[-2:])
        return x + self.rim(out) * self.mean(x.mean((0, 2, 3))).view(-1, 1, 1)


class Attention(nn.Module):
    """With torch's own attention, which has weights that no linear layer or convolution is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


KINDS = {
    'vit': (lambda: Block(16, 4, init_values=0.1), (2, 9, 16)),
    'convnext': (lambda: ConvNeXtBlock(8), (2, 8, 9, 7)),
    'plugin': (lambda: Bottleneck(16, 4, plugins=[dict(cfg=dict(type='ContextBlock', ratio=1 / 4),
                                                       position='after_conv3')]), (2, 16, 9, 7)),
    'res2net': (lambda: Bottle2neck(16, 4, scales=2, base_width=32, stage_type='normal'), (2, 16, 9, 7)),
    'attention': (Attention, (2, 9, 8)),
    'flat': (Flat, (9, 8)),
    'odd': (Odd, (2, 8, 8, 6)),
}
LIGHT = {
    'slim': (lambda: Bottleneck(16, 4), dict(type='SlimBlock', width=0.5)),
    'slim mlp': (lambda: Block(16, 4), dict(type='SlimBlock', width=0.5)),
    'pooled': (lambda: Bottleneck(16, 4), dict(type='PooledBlock', stride=2)),
    'depthwise': (lambda: Bottleneck(16, 4), dict(type='DepthwiseBlock')),
}


@pytest.fixture
def build(chain):
    def net(kind: str = 'vit', sample: float | None = 1, memory: str | None = None, **more) -> nn.Module:
        make, operator = LIGHT[kind] if kind in LIGHT else (KINDS[kind][0], None)
        return chain(make, operator=operator, sample=sample, memory=memory, **more)
    return net


def given(kind: str = 'vit', shape: tuple[int, ...] | None = None) -> Tensor:
    if kind in LIGHT:
        shape = shape or ((2, 9, 16) if kind == 'slim mlp' else (2, 16, 9, 7))
    return torch.randn(shape or KINDS[kind][1], generator=torch.Generator().manual_seed(1)).double()


def saved(model: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """What is kept for backward, the model's own state apart."""
    own, kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]


# Exact gradients

@pytest.mark.parametrize('memory', [None, 'masks', 'recompute'])
@pytest.mark.parametrize('kind', KINDS)
def test_sample_one_is_plain_autograd(build, gradients, assert_same, kind, memory):
    x = given(kind)
    assert_same(gradients(build(kind, 1, memory), x), gradients(build(kind, None), x))


@pytest.mark.parametrize('memory', [None, 'masks', 'recompute', 'rebuild'])
@pytest.mark.parametrize('kind', LIGHT)
def test_sample_one_is_plain_autograd_with_light_operators(build, gradients, assert_same, kind, memory):
    if kind == 'pooled' and memory == 'rebuild':
        memory = 'masks'  # it has norms
    x = given(kind)
    assert_same(gradients(build(kind, 1, memory), x), gradients(build(kind, None), x))


@pytest.mark.parametrize('fusion', ['ChannelFusion', 'TransformFusion'])
def test_sample_one_with_other_fusions(build, gradients, assert_same, fusion):
    x = given()
    assert_same(gradients(build(fusion=fusion), x), gradients(build(sample=None, fusion=fusion), x))


@pytest.mark.parametrize('kind', ['vit', 'res2net'])
def test_sample_one_with_replaced_blocks_side_by_side_in_train_mode(build, gradients, assert_same, kind):
    x = given(kind)
    expected = gradients(build(kind, None, replaced=(1, 2, 3), train=True), x)
    assert_same(gradients(build(kind, replaced=(1, 2, 3), train=True), x), expected)


def swin(randomise_, **gradient) -> RLSwin:
    torch.manual_seed(0)
    model = RLSwin(embed_dims=8, depths=(2, 2, 4, 2), num_heads=(1, 2, 2, 4), window_size=4, replacement=dict(
        plan=dict(type='Blocks', blocks={'stages.2.blocks': [1, 2]}), gradient=gradient))
    randomise_(model).double().eval()  # which mmdet's gives nothing back of
    return model


@pytest.mark.parametrize('memory', ['masks', 'recompute'])
def test_swin(randomise_, gradients, assert_same, memory):
    """Its windows are shifted, and its position tables are indexed: no layer is called with these."""
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    expected = gradients(swin(randomise_), image)
    assert_same(gradients(swin(randomise_, sample=1, memory=memory), image), expected)
    sampled = gradients(swin(randomise_, sample=1 / 4, memory=memory), image)
    for name in [name for name in expected if name.endswith('coeff')]:
        assert not torch.allclose(sampled.pop(name), expected.pop(name), rtol=1e-3)
    assert_same(sampled, expected)


class TwoWays(Flat):
    """With another way forward, as the blocks of recursive feature pyramids have."""

    def rfp_forward(self, x: Tensor, feature: Tensor) -> Tensor:
        return self(x) + self.fc1(feature).sum()


def test_other_ways_forward(chain, assert_same):
    found, x = [], torch.randn(9, 8).double()
    for sample in (None, 1):
        model = chain(TwoWays, sample=sample)
        model[0][1].rfp_forward(x, x.square()).square().sum().backward()
        found.append({'coeff': model[0][1].coeff.grad})
    assert_same(*found)


# Estimates

@pytest.mark.parametrize('kind', [*KINDS, *LIGHT])
def test_gradients_that_are_not_sampled_are_exact(build, gradients, assert_same, kind):
    x = given(kind)
    expected, actual = gradients(build(kind, None), x), gradients(build(kind, 1 / 4), x)
    coefficients = expected.pop(COEFF), actual.pop(COEFF)
    assert not torch.allclose(*coefficients, rtol=1e-3)
    if kind in LIGHT:
        assert actual.pop('0.1.scale').shape == expected.pop('0.1.scale').shape
    assert_same(actual, expected)


@pytest.mark.parametrize(('kind', 'shape', 'draws'), [
    ('vit', (1, 4, 16), 2 ** 4), ('vit', (1, 5, 16), 2 ** 4), ('plugin', (1, 16, 4, 3), 2 ** 4),
    ('res2net', (1, 16, 4, 3), 2 ** 3), ('convnext', (1, 8, 4, 3), 2 ** 3), ('attention', (1, 4, 8), 2 ** 2),
    ('flat', (5, 8), 2 ** 2), ('odd', (1, 8, 6, 4), 2 ** 3), ('slim', (1, 16, 4, 3), 2 ** 3),
    ('slim mlp', (1, 4, 16), 2 ** 2), ('pooled', (1, 16, 5, 3), 2 ** 3), ('depthwise', (1, 16, 4, 3), 2)])
def test_estimate_is_unbiased_over_all_parts(build, gradients, at_every_draw, mean, assert_same, kind, shape, draws):
    x = given(kind, shape)
    expected = gradients(build(kind, None), x)
    found = at_every_draw(build(kind, 1 / 2), x)
    assert len(found) == draws
    assert_same(mean(found), expected)
    assert any(not torch.allclose(draw[COEFF], expected[COEFF], rtol=1e-3) for draw in found)


def test_fewer_tokens_than_parts_make_a_part_of_each(build, gradients, at_every_draw, mean, assert_same):
    x = given('flat', (3, 8))
    found = at_every_draw(build('flat', 1 / 8), x)
    assert len(found) == 3 ** 2
    assert_same(mean(found), gradients(build('flat', None), x))


def test_few_rows_are_warned_of_once_per_layer(build, gradients, caplog):
    model = build('res2net', 1 / 8, replaced=(1, 2))
    gradients(model, given('res2net'))
    assert not caplog.records
    for rows in (3, 2):
        gradients(model, given('res2net', (1, 16, rows, 5)))
    assert [record.message for record in caplog.records] == [
        'sample=0.125 asks for 8 parts of the rows, but a Bottle2neck sees a map of 3: each is a part there'] * 2


# The control variate

@pytest.fixture
def steered(monkeypatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each estimate that was given its exact part, its weight, and what that part is."""
    seen, given_exact_part = [], sampled_layers.with_exact_part
    monkeypatch.setattr(sampled_layers, 'with_exact_part',
                        lambda *args: seen.append(args) or given_exact_part(*args))
    return seen


def test_a_linear_layer_behind_a_norm_has_its_exact_part(build, gradients, steered):
    """Of a ViT's block the first one of attention and of the MLP: their parts along the weights are those of all."""
    x = given()
    gradients(build(sample=1 / 4), x)
    gradients(build(sample=1 / 3), x)
    shapes = [weight.shape for _, weight, _ in steered]
    assert sorted(shapes) == [(48, 16), (48, 16), (64, 16), (64, 16)]
    for size in (48, 64):
        (one, _, exact), (other, _, same) = (args for args in steered if len(args[1]) == size)
        assert not torch.allclose(one, other, rtol=1e-3)
        torch.testing.assert_close(exact, same, rtol=1e-12, atol=0)


@pytest.mark.parametrize('kind', ['vit', 'convnext', 'attention'])
def test_the_exact_part_makes_the_spread_smaller(build, gradients, at_every_draw, monkeypatch, kind):
    x = given(kind, (1, *KINDS[kind][1][1:-1][:1], 4, 3) if kind == 'convnext' else (1, 4, KINDS[kind][1][-1]))
    expected, model = gradients(build(kind, None), x), build(kind, 1 / 2)

    def spread() -> float:
        return torch.stack([draw[COEFF] - expected[COEFF] for draw in at_every_draw(model, x)]).square().sum().item()

    steered = spread()
    monkeypatch.setattr(sampled_layers, '_steered', lambda *_: {})
    assert 0 < steered < spread()


class Parts(nn.Module):
    """What the blocks below are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(8), nn.LayerNorm(8)
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)
        self.attn = nn.MultiheadAttention(8, 2)
        self.conv, self.point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)


def _changed_in_place(self, x):
    h = F.gelu(self.fc1(x))
    h.mul_(2)
    return x + self.fc2(h)


def _dropped_in_place(self, x):
    h = F.silu(self.fc1(x))
    return x + self.fc2(F.threshold(h, 0., 0., inplace=True))


def _norm_of_two_layers(self, x):
    h = self.norm(x)
    return x + self.fc1(h) * self.fc2(h)


def _norm_seen_by_attention(self, x):
    h = self.norm(x)
    return x + self.attn(h, h, h)[0] * self.fc1(h)


def _norm_in_halves(self, x):
    h = self.norm(x)
    one, other = h.chunk(2, -1)
    return x + torch.cat([other, one * 2], -1) * self.fc1(h)


def _norm_in_a_list(self, x):
    h = self.norm(x)
    return x + self.fc3(torch.cat([h, x], -1)) * self.fc1(h)


def _norm_used_before(self, x):
    h = self.norm(x)
    return x + h * self.fc1(h)


def _one_norm_twice(self, x):
    return x + self.fc1(self.norm(x)) * self.fc2(self.norm(x.square()))


def _one_layer_twice(self, x):
    return x + self.fc1(self.norm(x)) * self.fc1(x)


def _one_layer_behind_two_norms(self, x):
    return x + self.fc1(self.norm(x)) * self.fc1(self.other(x.square()))


def _weight_used_otherwise(self, x):
    return x + self.fc1(self.norm(x)) * (x @ self.fc1.weight)


def _norms_weight_used_otherwise(self, x):
    return x * self.norm.weight + self.fc1(self.norm(x))


def _norm_before_a_padded_convolution(self, x):
    return x + self.point(self.conv(self.norm(x)))


def _gelu_before_a_padded_convolution(self, x):
    return x + self.point(self.conv(F.gelu(x)))


@pytest.mark.parametrize('forward', [
    _changed_in_place, _dropped_in_place, _norm_of_two_layers, _norm_seen_by_attention, _norm_in_halves,
    _norm_in_a_list, _norm_used_before, _one_norm_twice, _one_layer_twice, _one_layer_behind_two_norms,
    _weight_used_otherwise, _norms_weight_used_otherwise, _norm_before_a_padded_convolution,
    _gelu_before_a_padded_convolution])
def test_what_is_known_of_a_layers_input_is_not_taken_for_more(chain, gradients, at_every_draw, mean, assert_same,
                                                               forward, steered):
    kind = type('Kind', (Parts,), dict(forward=forward))
    x = torch.randn(1, 4, 5, 8) if 'convolution' in forward.__name__ else torch.randn(1, 4, 8)
    expected = gradients(chain(kind, sample=None), x.double())
    found = at_every_draw(chain(kind, sample=1 / 2), x.double())
    assert_same(mean(found), expected)
    assert len(found) > 1 and not steered


# What is kept

@pytest.mark.parametrize('kind', ['vit', 'convnext', 'res2net', 'attention', 'flat', 'slim mlp'])
def test_saved_bytes_are_less_by_the_synthesised_weights_at_least(build, kind):
    x, found = given(kind).requires_grad_(), {}
    for sample in (None, 1 / 8):
        model = build(kind, sample)
        found[sample] = saved_bytes(model, lambda model=model: model(x))
    layer = model[0][1]
    with torch.no_grad():
        weights = {name: tensor for name, tensor in layer.weights().items() if tensor.ndim > 1}
    sampled = sum(tensor.numel() for name, tensor in weights.items() if not name.startswith('attn.') or kind == 'vit')
    assert found[None] - found[1 / 8] >= 8 * sampled > 0


def test_saved_bytes_of_a_vit_block(build):
    """64 tokens, C = 16, 8 parts. Not kept are the weights (12C²), and the outputs of the norms and the GELU (6C per
    token), whose inputs are. What attention gives is kept in any case, the part of it comes on top."""
    x, found = given(shape=(1, 64, 16)).requires_grad_(), {}
    for sample in (None, 1 / 8):
        model = build(sample=sample)
        found[sample] = saved_bytes(model, lambda model=model: model[0][1](x))
    assert found[None] - found[1 / 8] == 8 * (12 * 16 ** 2 + 64 * 6 * 16 - 64 * 16 // 8)


@pytest.mark.parametrize('kind', ['vit', 'convnext', 'res2net', 'plugin', 'slim', 'slim mlp', 'depthwise'])
def test_no_synthesised_weight_is_kept(build, kind):
    model, x = build(kind, 1 / 8), given(kind).requires_grad_()
    layer = model[0][1]
    with torch.no_grad():
        shapes = {tuple(tensor.shape) for tensor in layer.weights().values() if tensor.ndim in (2, 4)}
    kept = saved(model, lambda: layer(x))
    assert kept and not shapes & {tuple(tensor.shape) for tensor in kept}


@pytest.mark.parametrize('memory', ['masks', 'recompute'])
@pytest.mark.parametrize('kind', ['vit', 'res2net', 'odd', 'pooled'])
def test_weights_made_again_are_dropped_after_backward(build, monkeypatch, kind, memory):
    runs, made = [], []

    class Spy(sampled_layers.Again):
        def __init__(self, make: Callable[[], dict[str, Tensor]]) -> None:
            super().__init__(lambda: self.remember(make()))
            runs.append(self)

        @staticmethod
        def remember(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            made.append([weakref.ref(tensor) for tensor in tensors.values()])
            return tensors

    monkeypatch.setattr(gradients_module, 'Again', Spy)
    loss = build(kind, 1 / 4, memory)(given(kind).requires_grad_()).sum()
    assert not made
    loss.backward(retain_graph=True)
    assert len(made) == 1
    assert all(not run._made for run in runs)
    # all that is left are a light operator's own parameters
    assert [ref() for ref in made[0] if not isinstance(ref(), (nn.Parameter, type(None)))] == []
    loss.backward()
    assert len(made) == 2


def test_a_layer_that_runs_twice_has_its_weight_made_once(chain, gradients, assert_same, monkeypatch):
    class Twice(Flat):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    counts, x = [], given('flat')
    again = sampled_layers.Again
    monkeypatch.setattr(gradients_module, 'Again', lambda make: again(lambda: counts.append(1) or make()))
    assert_same(gradients(chain(Twice, sample=1), x), gradients(chain(Twice, sample=None), x))
    assert len(counts) == 1


# Recomputed

@pytest.mark.parametrize('kind', ['vit', 'convnext', 'res2net', 'attention', 'pooled'])
def test_recompute_draws_the_same_parts_again(build, gradients, assert_same, kind):
    found, x = [], given(kind)
    for memory in ('masks', 'recompute'):
        torch.manual_seed(5)
        found.append(gradients(build(kind, 1 / 4, memory), x))
    assert_same(*found)


def test_recompute_does_not_compute_the_last_layer_again(chain):
    """Without a layer scale, nobody needs its output in backward."""
    x, found, tokens = given(shape=(1, 9, 16)).requires_grad_(), {}, 9
    for memory in ('masks', 'recompute'):
        model = chain(lambda: Block(16, 4), sample=1 / 4, memory=memory)
        found[memory] = count_flops(lambda model=model: model(x).sum().backward())
    with torch.no_grad():
        forward = count_flops(lambda: model[0][1](x))
    last = 2 * tokens * 64 * 16
    assert found['recompute'] - found['masks'] == forward - last


def test_under_activation_checkpoints_the_same_parts_are_drawn_again(build, gradients, assert_same):
    found, x = [], given()
    for checkpointed in (False, True):
        model = build(sample=1 / 4)
        if checkpointed:
            stage = model[0].forward
            model[0].forward = lambda x, stage=stage: torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=False)
        torch.manual_seed(5)
        found.append(gradients(model, x))
    assert_same(*found)


# Between forward and backward

@pytest.mark.parametrize('memory', ['masks', 'recompute'])
@pytest.mark.parametrize('kind', ['vit', 'res2net', 'slim'])
def test_backward_twice_over_a_retained_graph(build, kind, memory):
    model, x = build(kind, 1 / 4, memory), given(kind).requires_grad_()
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    once = model[0][1].coeff.grad.clone(), x.grad.clone()
    loss.backward()
    for now, before in zip((model[0][1].coeff.grad, x.grad), once, strict=True):
        torch.testing.assert_close(now, 2 * before)


@pytest.mark.parametrize('memory', ['masks', 'recompute'])
@pytest.mark.parametrize('what', ['kept weight', 'coefficients'])
@pytest.mark.parametrize('wanted', ['all', 'input'])
def test_changes_in_place_before_backward_raise(build, what, memory, wanted):
    """Also where the gradient that is asked for doesn't go through the making of the weights."""
    model, x = build(memory=memory), given().requires_grad_()
    out = model[0][1](x)
    with torch.no_grad():
        {'kept weight': model[0][0].mlp.fc1.weight, 'coefficients': model[0][1].coeff}[what].mul_(2)
    with pytest.raises(RuntimeError, match='inplace'):
        out.sum().backward() if wanted == 'all' else torch.autograd.grad(out.sum(), x)


@pytest.mark.parametrize('kind', ['vit', 'res2net'])
def test_double_backward_raises(build, kind):
    x = given(kind).requires_grad_()
    [grad] = torch.autograd.grad(build(kind)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


# Beside other things

@pytest.mark.parametrize('memory', ['masks', 'recompute'])
@pytest.mark.parametrize('kind', ['vit', 'convnext', 'res2net', 'attention', 'slim'])
def test_autocast(build, gradients, kind, memory):
    x = given(kind).float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected = gradients(build(kind, None).float(), x)
        actual = gradients(build(kind, 1, memory).float(), x)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        assert (actual[name].float() - value.float()).norm() <= 0.05 * value.float().norm() + 1e-3, name


@pytest.mark.parametrize('kind', ['vit', 'convnext', 'res2net'])
def test_backward_outside_of_autocast_is_that_inside(build, assert_same, kind):
    found, x = [], given(kind).float()
    for inside in (True, False):
        model = build(kind).float()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(*found, 1e-6)


@pytest.mark.parametrize('kind', ['vit', 'res2net'])
def test_half_precision(build, gradients, kind):
    x = given(kind)
    expected, actual = gradients(build(kind, None), x), gradients(build(kind, 1).bfloat16(), x.bfloat16())
    assert (actual[COEFF].double() - expected[COEFF]).norm() < 0.1 * expected[COEFF].norm()


def test_channels_last(build, gradients, assert_same):
    x = given('res2net').to(memory_format=torch.channels_last)
    model = build('res2net').to(memory_format=torch.channels_last)
    assert_same(gradients(model, x), gradients(build('res2net', None), x))


def test_copies(build, gradients, assert_same):
    model, x = build(), given()
    expected = gradients(model, x)
    assert_same(gradients(copy.deepcopy(model), x), expected)


def test_frozen_coefficients(build, gradients, assert_same):
    found, x = [], given()
    for sample in (None, 1 / 4):
        model = build(sample=sample)
        model[0][1].coeff.requires_grad_(False)
        found.append(gradients(model, x))
    assert_same(*found)


def test_input_that_does_not_learn(build):
    found, x = [], given()
    for sample in (None, 1):
        model = build(sample=sample)
        model[0][1](x).square().sum().backward()
        found.append(model[0][1].coeff.grad)
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


def test_without_gradients_nothing_is_drawn(build):
    model, state = build(sample=1 / 4), torch.get_rng_state()
    with torch.no_grad():
        model(given())
    assert torch.equal(torch.get_rng_state(), state)


def test_compiled_it_is_plain_autograd(build, gradients, assert_same, monkeypatch):
    x = given()
    expected = gradients(build(sample=None), x)
    monkeypatch.setattr(gradients_module.Gradient, '_run_layers', None)
    actual = gradients(torch.compile(build(sample=1 / 4), backend='eager'), x)
    assert_same({name.removeprefix('_orig_mod.'): value for name, value in actual.items()}, expected)


def test_skip_has_nothing_to_sample(chain, gradients, assert_same):
    x = given('res2net')
    found = [gradients(model := chain(KINDS['res2net'][0], operator=dict(type='Skip'), sample=sample), x)
             for sample in (None, 1 / 4)]
    assert_same(*found)
    assert model[0][1].way is None


def test_the_input_may_be_given_by_name(build):
    assert torch.equal(build(sample=1)[0][1](x=given()), build(sample=None)[0][1](x=given()))


def test_tokens_of_a_map_with_the_channels_last_are_not_warned_of(chain, caplog):
    chain(Flat, sample=1 / 8)(torch.randn(2, 12, 6, 8).double())
    assert not caplog.records


# Which blocks

def test_the_report_says_that_they_are_sampled_layer_by_layer():
    model = nn.Sequential(nn.Sequential(*(Block(8, 2) for _ in range(3))))
    report = replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2), gradient=dict(sample=0.5)))
    assert '0.1 (Block): replaced, from 0.0 and 0.2; learns 2, sampled layer by layer\n' in str(report)
    assert [row.way for row in report.rows] == [None, 'layers', None]


def test_every_replaced_block_of_a_net_learns(toy_net):
    model = toy_net()
    report = replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2), gradient=dict(sample=0.5)))
    assert 'layer2.1 (Unit): replaced, from layer2.0 and layer2.2; learns 2, sampled layer by layer' in str(report)
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    assert all(layer.coeff.grad is not None for layer in computing_layers(model).values())
