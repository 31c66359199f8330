"""The cheap backward of replaced convolution blocks: equal to plain autograd, unbiased, and less is kept."""
import copy
import itertools

import pytest
import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.resnext import Bottleneck as ResNeXtBottleneck
from timm.models.resnet import Bottleneck as TimmBottleneck
from torch import Tensor, nn

from rl_mmdet.analysis import count_flops, saved_bytes
from rl_mmdet.replacement import cheap_block, computing_layers, replace_blocks_

KINDS = {
    'basic': (lambda: BasicBlock(8, 8), 8),
    'bottleneck': (lambda: Bottleneck(16, 4), 16),
    'dilated': (lambda: Bottleneck(16, 4, dilation=2), 16),
    'resnext': (lambda: ResNeXtBottleneck(16, 4, groups=2, base_width=32), 16),
    'timm': (lambda: TimmBottleneck(16, 4), 16),
}
FUSIONS = ['ScalarFusion', 'ChannelFusion', 'TransformFusion']


@pytest.fixture
def build(randomise_):
    def net(kind: str = 'bottleneck', sample: float | None = 1, memory: str | None = None, blocks: tuple = (1,),
            fusion: str = 'ScalarFusion', **more) -> nn.Module:
        torch.manual_seed(0)
        make, _ = KINDS[kind]
        model = nn.Sequential(nn.Sequential(*(make() for _ in range(len(blocks) + 2))))
        randomise_(model)
        replace_blocks_(model, dict(plan=dict(type='Blocks', blocks={'0': list(blocks)}), fusion=dict(type=fusion),
                                    gradient=dict(sample=sample, memory=memory, **more)))
        for parameter in model.parameters():
            if parameter.ndim == 1 and len(parameter) == 2:
                nn.init.uniform_(parameter, 0.3, 0.7)
        return model.double().eval()
    return net


def picture(kind: str, batch: int = 2, size: tuple[int, int] = (9, 7)) -> Tensor:
    return torch.randn(batch, KINDS[kind][1], *size, generator=torch.Generator().manual_seed(1)).double()


def gradients(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    image = image.clone().requires_grad_()
    out = model(image)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {'out': out.detach(), 'image': image.grad} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm() + 1e-12, name


def is_cheap(model: nn.Module, image: Tensor) -> bool:
    return 'CheapBlock' in type(model[0][:2](image).grad_fn).__name__


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
@pytest.mark.parametrize('kind', KINDS)
def test_sample_one_is_plain_autograd(build, kind, memory):
    image = picture(kind)
    expected = gradients(build(kind, None), image)
    assert_equal(gradients(build(kind, 1, memory), image), expected)


@pytest.mark.parametrize('fusion', FUSIONS)
def test_sample_one_with_every_fusion(build, fusion):
    image = picture('bottleneck')
    expected = gradients(build(sample=None, fusion=fusion), image)
    assert_equal(gradients(build(fusion=fusion), image), expected)


@pytest.mark.parametrize('memory', [None, 'rebuild'])
def test_sample_one_with_replaced_blocks_side_by_side(build, memory):
    image = picture('basic')
    expected = gradients(build('basic', None, blocks=(1, 2, 3)), image)
    assert_equal(gradients(build('basic', 1, memory, blocks=(1, 2, 3)), image), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_the_cheap_path_is_taken(build, kind):
    assert is_cheap(build(kind), picture(kind))


@pytest.mark.parametrize('memory', [None, 'rebuild'])
@pytest.mark.parametrize(('kind', 'convolutions'), [('basic', 2), ('dilated', 3), ('resnext', 3)])
@pytest.mark.parametrize('rows', [8, 9])
def test_estimate_is_unbiased_over_all_bands(build, monkeypatch, kind, convolutions, memory, rows):
    """Three bands per convolution; with nine rows they are equal, with eight the last is smaller."""
    image = picture(kind, size=(rows, 5))
    expected = gradients(build(kind, None), image)
    model, draws = build(kind, 1 / 3, memory), []
    for choice in itertools.product(range(3), repeat=convolutions):
        queue = list(choice)
        monkeypatch.setattr(cheap_block.torch, 'randint', lambda count, size, queue=queue: torch.tensor(queue.pop(0)))
        draws.append(gradients(model, image))
    mean = {name: sum(draw[name] for draw in draws) / len(draws) for name in expected}
    assert_equal(mean, expected)
    assert any(not torch.allclose(draw['0.1.coeff'], expected['0.1.coeff'], rtol=1e-3) for draw in draws)


def test_gradients_that_are_not_sampled_are_exact(build):
    image = picture('bottleneck')
    expected, actual = gradients(build(sample=None), image), gradients(build(sample=1 / 4), image)
    assert_equal({n: v for n, v in actual.items() if 'coeff' not in n},
                 {n: v for n, v in expected.items() if 'coeff' not in n})


def test_bands_follow_the_seed(build):
    model, image, found = build(sample=1 / 8), picture('bottleneck', size=(16, 4)), []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        found.append(gradients(model, image)['0.1.coeff'])
    assert torch.equal(found[0], found[1])
    assert any(not torch.equal(found[0], other) for other in found[2:])


def test_fewer_rows_than_bands_take_a_band_for_each_row(build):
    image = picture('bottleneck', size=(3, 5))
    assert all(torch.isfinite(value).all() for value in gradients(build(sample=1 / 8), image).values())


def test_saved_bytes(build):
    """At K bands of rows: per position of the Bottleneck (C = 16, w = 4) bools and 1/K of the convolutions' inputs."""
    image = picture('bottleneck', batch=1, size=(16, 16)).requires_grad_()
    positions, found = 256, {}
    for memory, bands in ((None, 1), (None, 8), ('rebuild', 8)):
        model = build(sample=1 / bands, memory=memory)
        found[memory, bands] = saved_bytes(model, lambda model=model: model(image))
    plain = saved_bytes(build(sample=None), lambda: build(sample=None)(image))
    assert found[None, 8] < found[None, 1] < plain
    bools = positions * (4 + 4 + 16)
    assert found[None, 1] - found[None, 8] <= 8 * positions * (16 + 4 + 4) * 7 / 8
    assert found['rebuild', 8] < found[None, 8] - positions * (16 - 4) * 8 * 0.9 + bools


def test_flops_are_those_of_forward_input_gradient_and_the_sampled_part(build):
    image = picture('bottleneck', batch=1, size=(16, 16)).requires_grad_()
    block = 2 * 256 * (16 * 4 + 9 * 4 * 4 + 4 * 16)

    def step(model: nn.Module) -> int:
        model(image)  # the first time, the recipe is checked
        return count_flops(lambda: model(image).sum().backward())

    plain = step(build(sample=None))
    sampled = step(build(sample=1 / 8))
    assert plain == 9 * block
    assert plain - sampled == block * 7 / 8


def test_training_norms_take_the_plain_path(build):
    model, image = build(), picture('bottleneck')
    model.train()
    expected = build(sample=None)
    expected.train()
    assert_equal(gradients(model, image), gradients(expected, image))
    assert not is_cheap(model, image)


class Scaled(BasicBlock):
    """Looks like a BasicBlock and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_block_that_computes_something_else_takes_the_plain_path(build, monkeypatch, caplog):
    monkeypatch.setitem(KINDS, 'scaled', (lambda: Scaled(8, 8), 8))
    image = picture('basic')
    expected = gradients(build('scaled', None), image)
    model = build('scaled')
    assert_equal(gradients(model, image), expected)
    assert not is_cheap(model, image)
    assert "a Scaled doesn't compute what its modules suggest" in caplog.text


@pytest.mark.parametrize('what', ['kept weight', 'running statistics'])
def test_changes_in_place_before_backward_raise(build, what):
    model = build()
    out = model(picture('bottleneck').requires_grad_())
    with torch.no_grad():
        tensor = model[0][0].conv2.weight if what == 'kept weight' else model[0][1].bn1.running_var
        tensor.mul_(2)
    with pytest.raises(RuntimeError, match='inplace'):
        out.sum().backward()


def test_double_backward_raises(build):
    image = picture('bottleneck').requires_grad_()
    [grad] = torch.autograd.grad(build()(image).square().sum(), image, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_under_activation_checkpoints_the_same_band_is_drawn_again(build):
    model, image = build(sample=1 / 4), picture('bottleneck')
    torch.manual_seed(5)
    expected = gradients(model, image)
    stage = model[0].forward
    model[0].forward = lambda x: torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=False)
    torch.manual_seed(5)
    assert_equal(gradients(model, image), expected)


@pytest.mark.parametrize('memory', [None, 'rebuild'])
def test_autocast(build, memory):
    image = picture('bottleneck').float()
    model = build(memory=memory).float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected = gradients(build(sample=None).float(), image)
        actual = gradients(model, image)
        assert is_cheap(model, image.requires_grad_())
    for name, value in expected.items():
        assert (actual[name].float() - value.float()).norm() <= 0.05 * value.float().norm() + 1e-3, name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_cheap_path(build, dtype):
    model, image = build().to(dtype), picture('bottleneck').to(dtype)
    assert is_cheap(model, image.requires_grad_())


def test_channels_last_stays(build):
    image = picture('bottleneck').to(memory_format=torch.channels_last)
    model = build().to(memory_format=torch.channels_last)
    assert model(image.clone().requires_grad_()).is_contiguous(memory_format=torch.channels_last)
    assert_equal(gradients(model, image), gradients(build(sample=None), image))


def test_copies(build):
    model, image = build(), picture('bottleneck')
    expected = gradients(model, image)
    assert_equal(gradients(copy.deepcopy(model), image), expected)


def test_compiled(build):
    image = picture('bottleneck')
    expected = gradients(build(), image)
    actual = gradients(torch.compile(build(), backend='aot_eager'), image)
    assert_equal({name.removeprefix('_orig_mod.'): value for name, value in actual.items()}, expected)


def test_recipes():
    def recipe(block: nn.Module) -> bool:
        return cheap_block.recipe_of(block) is not None

    assert all(recipe(make()) for make, _ in KINDS.values())
    assert not recipe(BasicBlock(8, 8, norm_cfg=dict(type='GN', num_groups=2)))
    assert not recipe(Bottleneck(16, 4, plugins=[dict(cfg=dict(type='ContextBlock', ratio=1 / 4),
                                                      position='after_conv3')]))
    assert not recipe(Bottleneck(16, 4, dcn=dict(type='DCN', deform_groups=1), conv_cfg=None))
    assert not recipe(TimmBottleneck(16, 4, act_layer=nn.SiLU))


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


def test_sampling_light_operators_is_refused(toy_net):
    with pytest.raises(ValueError, match=r'sample=0.5 is for FullBlock; SlimBlock\(.*\) takes plain autograd'):
        replace_blocks_(toy_net(), dict(plan=dict(type='EveryKth', k=2), operator=dict(type='SlimBlock'),
                                        gradient=dict(sample=0.5)))


def test_blocks_that_cannot_be_sampled_learn_all_the_same(toy_net):
    model = toy_net()
    report = replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2), gradient=dict(sample=0.5, memory='rebuild')))
    assert "layer2.1 (Unit): replaced, from layer2.0 and layer2.2; learns 2, by plain autograd" in str(report)
    model.eval()
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    assert all(layer.coeff.grad is not None for layer in computing_layers(model).values())
