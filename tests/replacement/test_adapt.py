"""Shape adaptation in chains: which kept blocks are used at the ends of stages, and that all else holds as without."""
import copy
import math

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

import rl_mmdet.models  # noqa: F401  registers the RL backbones
from rl_mmdet.replacement import adapt_state_dict, computing_layers, find_chains, materialize, replace_blocks_

RESNET = dict(type='ResNet', depth=50, base_channels=4)
SWIN = dict(type='SwinTransformer', embed_dims=8, depths=(2, 2, 6, 2), num_heads=(2, 2, 4, 4), window_size=4)
PLACES = [
    (RESNET, {'layer2': [0]}),  # a first block, with stride and downsample
    (RESNET, {'layer2': [3]}),  # a last block
    (RESNET, {'layer1': [0], 'layer4': [2]}),  # the first and the last of the model
    (RESNET, {'layer1': [2], 'layer2': [0]}),  # both sides of a border
    (RESNET, {'layer3': [0, 1, 2, 3, 4, 5]}),  # a whole stage
    (SWIN, {'stages.2.blocks': [0]}),
    (SWIN, {'stages.0.blocks': [1], 'stages.3.blocks': [1]}),
    (SWIN, {'stages.0.blocks': [0, 1], 'stages.1.blocks': [0]}),
]
IDS = [f'{cfg["type"]}-{"+".join(f"{name}{indices}" for name, indices in blocks.items())}' for cfg, blocks in PLACES]
everywhere = pytest.mark.parametrize(('cfg', 'blocks'), PLACES, ids=IDS)


def build(cfg: dict, blocks: dict | None = None, adapt: bool = True, fusion: str = 'ScalarFusion') -> nn.Module:
    """The same weights at every call; ``blocks`` replaced by ``RL...``, the unmodified class without them."""
    torch.manual_seed(0)
    if blocks is None:
        return MODELS.build(copy.deepcopy(cfg))
    replacement = dict(plan=dict(type='Blocks', blocks=blocks), fusion=dict(type=fusion, adapt=adapt))
    name = {'ResNet': 'RLResNet', 'SwinTransformer': 'RLSwin'}[cfg['type']]
    return MODELS.build(dict(copy.deepcopy(cfg), type=name, replacement=replacement))


def in_mode(model: nn.Module, train: bool = False) -> nn.Module:
    model.train(train)
    return model


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope='module')
def resnet() -> nn.Module:
    return build(RESNET)


def names(places) -> tuple:
    return tuple(place and place.name for place in places)


# Who is used

@pytest.mark.parametrize(('stage', 'index', 'choice', 'expected'), [
    ('layer1', 0, {}, (None, 'layer1.1')),
    ('layer2', 0, {}, ('layer1.2', 'layer2.1')),
    ('layer1', 2, {}, ('layer1.1', 'layer2.0')),
    ('layer4', 2, {}, ('layer4.1', None)),
    ('layer2', 0, {'layer1': [2], 'layer2': [0]}, ('layer1.1', 'layer2.1')),  # a replaced block there is skipped
    ('layer2', 0, {'layer1': [0, 1, 2], 'layer2': [0]}, (None, 'layer2.1')),  # so is a whole stage
    ('layer3', 2, {'layer3': range(6)}, ('layer2.3', 'layer4.0')),
    ('layer2', 2, {'layer1': [2], 'layer2': [1, 2, 3]}, ('layer2.0', 'layer3.0')),
])
def test_neighbours_are_the_nearest_kept_of_all_stages(resnet, stage, index, choice, expected):
    chain = find_chains(resnet, adapt=True)[stage]
    assert names(chain.neighbours(index, choice)) == expected


@pytest.mark.parametrize(('stage', 'index', 'choice', 'tensor', 'expected'), [
    # the right size in the own stage is preferred to a nearer block of another size
    ('layer2', 2, {'layer2': [2]}, 'conv1.weight', ('layer2.1', 'layer2.3')),
    ('layer2', 1, {}, 'conv1.weight', ('layer2.0', 'layer2.2')),
    ('layer2', 3, {'layer2': [2, 3]}, 'conv1.weight', ('layer2.1', 'layer3.0')),
    # only first blocks have a downsample
    ('layer2', 0, {}, 'downsample.0.weight', ('layer1.0', 'layer3.0')),
    ('layer2', 0, {'layer2': [0], 'layer3': [0]}, 'downsample.0.weight', ('layer1.0', 'layer4.0')),
    ('layer1', 0, {}, 'downsample.0.weight', (None, 'layer2.0')),
    ('layer4', 0, {}, 'downsample.1.bias', ('layer3.0', None)),
    ('layer4', 0, {}, 'conv2.weight', ('layer3.5', 'layer4.1')),
])
def test_sources_of_a_tensor(resnet, stage, index, choice, tensor, expected):
    chain = find_chains(resnet, adapt=True)[stage]
    assert names(chain.sources(index, choice)[tensor]) == expected


class Sized(nn.Module):
    """A residual unit whose second weight has a size of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, size), nn.Linear(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.three(self.two(self.one(x)))


def test_the_right_size_further_away_in_the_own_stage_is_preferred():
    model = nn.Sequential(Sized(8), Sized(6), Sized(8), Sized(6))
    chain = find_chains(model, adapt=True)['']
    assert names(chain.sources(2)['two.weight']) == ('0', '3')
    assert names(chain.sources(2)['one.weight']) == ('1', '3')


def test_another_stage_is_not_preferred_for_its_size():
    model = nn.ModuleDict({'a': nn.Sequential(Sized(8), Sized(8)), 'b': nn.Sequential(Sized(6), Sized(8), Sized(6))})
    chain = find_chains(model, adapt=True)['b']
    assert names(chain.sources(1)['two.weight']) == ('b.0', 'b.2')


def test_stages_of_other_blocks_are_no_neighbours(toy_net):
    model = nn.Sequential(nn.Sequential(Sized(4), Sized(4)), toy_net().layer2, nn.Sequential(Sized(6), Sized(6)))
    chains = find_chains(model, adapt=True)
    assert names(chains['0'].neighbours(1)) == ('0.0', '2.0')
    assert names(chains['1'].neighbours(0)) == (None, '1.1')


def test_stage_of_depth_two_can_lose_either_or_both_blocks(toy_net):
    net = nn.ModuleDict({'a': nn.Sequential(Sized(8), Sized(8)), 'b': nn.Sequential(Sized(6), Sized(6))})
    chain = find_chains(net, adapt=True)['b']
    assert chain.replaceable() == [0, 1]
    assert names(chain.neighbours(0, {'b': [0, 1]})) == ('a.1', None)
    assert chain.why_not(0, {'b': [0, 1]}) is None
    assert find_chains(net)['b'].replaceable() == []


def test_everything_replaced_leaves_nobody():
    net = nn.Sequential(Sized(8), Sized(8))
    with pytest.raises(ValueError, match='no kept block before it in its model'):
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'': [0, 1]}), fusion=dict(adapt=True)))


def test_tensor_that_nobody_has_names_it_and_both_neighbours(toy_net):
    net = toy_net()  # layer1.0 alone has a shortcut
    with pytest.raises(ValueError, match=r'no kept block has a tensor shortcut\.weight.*nearest: layer1\.1'):
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'layer1': [0]}), fusion=dict(adapt=True)))


def test_every_block_of_the_backbone_can_be_replaced(resnet):
    for adapt, expected in [(True, [3, 4, 6, 3]), (False, [1, 2, 4, 1])]:
        assert [len(chain.replaceable()) for chain in find_chains(resnet, adapt=adapt).values()] == expected


# What is made

def test_made_weight_of_a_first_block_is_the_average_of_the_resized_neighbours():
    model = build(RESNET, {'layer2': [0]})  # conv1: 8 of 16 channels; layer1.2 has 4 of 16, layer2.1 8 of 32
    before, after = model.layer1[2].conv1.weight, model.layer2[1].conv1.weight
    expected = before[torch.arange(8) // 2] / 2 + after[:, torch.arange(16) * 2] * math.sqrt(32 / 16) / 2
    torch.testing.assert_close(model.layer2[0].synthesise()['conv1.weight'], expected)


def test_made_weight_of_the_last_block_is_half_of_the_one_before():
    model = build(RESNET, {'layer4': [2]})
    torch.testing.assert_close(model.layer4[2].synthesise()['conv3.weight'], model.layer4[1].conv3.weight / 2)


@everywhere
def test_made_tensors_have_the_removed_blocks_shapes(cfg, blocks):
    model, baseline = build(cfg, blocks), build(cfg)
    for name, layer in computing_layers(model).items():
        expected = {n: p.shape for n, p in baseline.get_submodule(name).named_parameters()}
        assert {n: t.shape for n, t in layer.synthesise().items()} == expected


@everywhere
def test_outputs_have_the_baselines_shapes_and_equal_the_materialized(cfg, blocks, randomise_, image):
    model = in_mode(randomise_(build(cfg, blocks)))
    plain = in_mode(materialize(model))
    expected = [out.shape for out in in_mode(build(cfg))(image)]
    assert [out.shape for out in model(image)] == expected
    for actual, made in zip(model(image), plain(image), strict=True):
        torch.testing.assert_close(actual, made, rtol=1e-4, atol=1e-4)


@everywhere
def test_materialized_has_the_baselines_state_dict(cfg, blocks):
    plain, baseline = materialize(build(cfg, blocks)).state_dict(), build(cfg).state_dict()
    assert {key: value.shape for key, value in plain.items()} == {key: v.shape for key, v in baseline.items()}


@everywhere
def test_state_dict_round_trip_restores_outputs(cfg, blocks, randomise_, image):
    source = in_mode(randomise_(build(cfg, blocks)))
    target = in_mode(randomise_(build(cfg, blocks), seed=9))
    assert not torch.allclose(source(image)[-1], target(image)[-1])
    target.load_state_dict(source.state_dict())
    for actual, expected in zip(target(image), source(image), strict=True):
        assert torch.equal(actual, expected)


@everywhere
@pytest.mark.parametrize('fusion', ['ScalarFusion', 'ChannelFusion', 'TransformFusion'])
def test_baselines_state_dict_fits(cfg, blocks, fusion, randomise_):
    model = build(cfg, blocks, fusion=fusion)
    adapted, report = adapt_state_dict(model, randomise_(build(cfg)).state_dict())
    assert (report.missing, report.left_over, report.mismatched) == ([], [], {})
    assert set(report.fits) == set(computing_layers(model))
    model.load_state_dict(adapted)


def test_baselines_state_dict_fit_uses_the_resized_neighbours(randomise_):
    baseline = randomise_(build(RESNET)).state_dict()
    model = build(RESNET, {'layer2': [0]})
    model.load_state_dict(baseline)
    with torch.no_grad():
        model.layer2[0].coeff.copy_(torch.tensor([0.8, -0.3]))
    planted = baseline | {f'layer2.0.{n}': t.detach() for n, t in model.layer2[0].synthesise().items()}
    again = build(RESNET, {'layer2': [0]})
    again.layer2[0].fusion.pretrained = 'least_squares'
    _, report = adapt_state_dict(again, planted)
    assert report.fits['layer2.0'].parameters['coeff'].tolist() == pytest.approx([0.8, -0.3], rel=1e-4)
    assert report.fits['layer2.0'].residual < 1e-5


@everywhere
@pytest.mark.parametrize('mode', ['detached', 'coupled'])
def test_one_step_gives_finite_gradients_to_all_that_learns(cfg, blocks, mode, image):
    model = build(cfg, blocks)
    for layer in computing_layers(model).values():
        layer.gradient.mode = mode
    in_mode(model, train=True)
    sum(out.square().mean() for out in model(image)).backward()
    for name, layer in computing_layers(model).items():
        assert torch.isfinite(layer.coeff.grad).all(), name
        assert layer.coeff.grad.any(), name


def test_duplicate_points_into_itself_across_the_border():
    model = copy.deepcopy(build(RESNET, {'layer2': [0]}))
    assert model.layer2[0].before is model.layer1[2]
    assert model.layer2[0].after is model.layer2[1]


def test_report_names_the_blocks_of_other_stages():
    lines = str(build(RESNET, {'layer2': [0]}).replacement_report).splitlines()
    [line] = [line for line in lines if line.strip().startswith('layer2.0 ')]
    assert 'from layer1.2 and layer2.1' in line
    assert 'layer1.0' in line
    assert 'layer3.0' in line  # they have its downsample


# Without it

@pytest.mark.parametrize('index', [1, 2])
def test_interior_blocks_with_neighbours_of_their_size_are_made_alike_without(index, randomise_, image):
    nets = [in_mode(randomise_(build(RESNET, {'layer3': [index + 1]}, adapt=adapt))) for adapt in (True, False)]
    for one, other in zip(*(net(image) for net in nets), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(('stage', 'index', 'reason'), [('layer2', 0, 'before'), ('layer2', 3, 'after')])
def test_without_it_the_ends_of_a_stage_can_not_be_replaced(stage, index, reason):
    with pytest.raises(ValueError, match=f'no kept block {reason} it in its stage'):
        build(RESNET, {stage: [index]}, adapt=False)


def test_without_it_sources_stay_in_the_stage(resnet):
    for chain in find_chains(resnet).values():
        for index in range(len(chain)):
            used = [p for sides in chain.sources(index).values() for p in sides if p is not None]
            assert all(place.chain is chain for place in used)
