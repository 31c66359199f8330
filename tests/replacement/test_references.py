"""The references: shared, fixed and randomly left out blocks, each against an ordinary model that does the same."""
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.models.backbones.detectors_resnet import Bottleneck as DetectorsBottleneck
from mmdet.models.backbones.resnet import BasicBlock
from mmdet.registry import MODELS
from torch import Tensor, nn

import rl_mmdet.models  # noqa: F401  registers the RL backbones
from rl_mmdet.replacement import StochasticDepth, adapt_state_dict, computing_layers, materialize, replace_blocks_
from rl_mmdet.replacement.fusions import OwnWeights, SharedWeights

BLOCKS = {'layer1': [1], 'layer2': [2, 3]}
REPLACED = ('layer1.1', 'layer2.2', 'layer2.3')
NEIGHBOURS = {'before': dict(zip(REPLACED, ('layer1.0', 'layer2.1', 'layer2.1'), strict=True)),
              'after': dict(zip(REPLACED, ('layer1.2', 'layer2.4', 'layer2.4'), strict=True))}
"""Whose tensors a replaced block has, but for layer1.1.conv1.weight, which layer1.0 has in another size."""
FIXED = dict(type='OwnWeights', learn=False)
P = 0.3
"""The rate, in most tests."""
sides = pytest.mark.parametrize('side', NEIGHBOURS)
modes = pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
fusions = pytest.mark.parametrize('fusion', ['OwnWeights', 'ScalarFusion'])


@pytest.fixture
def build(toy_net, randomise_) -> Callable[..., nn.Module]:
    """A replaced ToyNet in float64 with random weights and statistics, the same ones at every call."""
    def net(fusion: Any, operator: Any = None, blocks: dict = BLOCKS, **gradient: Any) -> nn.Module:
        model = toy_net()
        replace_blocks_(model, dict(plan=dict(type='Blocks', blocks=blocks), operator=operator, gradient=gradient,
                                    fusion=dict(type=fusion) if isinstance(fusion, str) else fusion))
        return randomise_(model).double()
    return net


@pytest.fixture
def baseline(toy_net, randomise_) -> nn.Module:
    return randomise_(toy_net()).double()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()


def shared(side: str = 'before') -> dict[str, str]:
    return dict(type='SharedWeights', side=side)


def depth(rate: float = P) -> dict[str, Any]:
    return dict(type='StochasticDepth', rate=rate)


# SharedWeights

@sides
@modes
def test_shared_computes_with_the_neighbours_block_in_its_place(build, baseline, image, side, train):
    net = build(shared(side))
    state = net.state_dict()
    for place, neighbour in NEIGHBOURS[side].items():
        for name, _ in baseline.get_submodule(place).named_parameters():
            source = 'layer1.2' if f'{place}.{name}' == 'layer1.1.conv1.weight' else neighbour
            state[f'{place}.{name}'] = state[f'{source}.{name}']
    baseline.load_state_dict(state)
    assert torch.equal(net.train(train)(image), baseline.train(train)(image))


def test_shared_takes_from_the_other_side_what_its_own_lacks(build):
    net = build(shared('before'))
    made = net.layer1[1].synthesise()
    assert torch.equal(made['conv1.weight'], net.layer1[2].conv1.weight)
    assert torch.equal(made['conv2.weight'], net.layer1[0].conv2.weight)


def test_shared_blocks_have_no_parameters_and_only_buffers_as_state(build, baseline):
    net = build(shared())
    assert all(not list(layer.parameters()) for layer in computing_layers(net).values())
    gone = {f'{place}.{name}' for place in REPLACED for name, _ in baseline.get_submodule(place).named_parameters()}
    assert list(net.state_dict()) == [key for key in baseline.state_dict() if key not in gone]


def test_shared_blocks_are_reported_to_learn_nothing(toy_net):
    report = replace_blocks_(toy_net(), dict(plan=dict(type='Blocks', blocks=BLOCKS), fusion=shared()))
    assert [row.learnable for row in report.rows if row.replaced] == [0, 0, 0]


@pytest.mark.parametrize(('side', 'neighbour'), [('before', 1), ('after', 4)])
def test_shared_and_coupled_learns_as_a_module_that_is_used_three_times(build, gradients, assert_same, image, side,
                                                                        neighbour):
    net = build(shared(side), blocks={'layer2': [2, 3]}, mode='coupled').train()
    expected = build('OwnWeights', blocks={'layer2': [2, 3]})
    expected.load_state_dict(net.state_dict(), strict=False)
    for index in (2, 3):
        expected.layer2[index] = expected.layer2[neighbour]
    wanted = gradients(expected.train(), image)  # under the name of the first of the three places
    assert_same(gradients(net, image), {name.replace('layer2.2.', f'layer2.{neighbour}.'): value
                                        for name, value in wanted.items()})


def test_shared_and_detached_the_neighbour_learns_from_its_own_place_only(build, gradients, assert_same, image):
    net = build(shared(), mode='detached').train()
    found, wanted = gradients(net, image), gradients(materialize(net), image)
    assert_same(found, {name: wanted[name] for name in found})


def test_shared_takes_a_baselines_state_dict(build, baseline, assert_same_state):
    net, state = build(shared()), {key: value + 1 for key, value in baseline.state_dict().items()}
    result = net.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_state(net.state_dict(), {key: state[key] for key in net.state_dict()})


@sides
def test_shared_load_report_has_the_distance_to_the_removed_blocks(build, baseline, side):
    def flat(block: str) -> Tensor:
        return torch.cat([parameter.flatten() for parameter in baseline.get_submodule(block).parameters()])
    _, report = adapt_state_dict(build(shared(side)), baseline.state_dict())
    assert set(report.fits) == set(REPLACED)
    for place in ('layer2.2', 'layer2.3'):
        expected = (flat(place) - flat(NEIGHBOURS[side][place])).norm() / flat(place).norm()
        assert report.fits[place].residual == pytest.approx(expected.item())
        assert report.fits[place].parameters == {}


@modes
def test_shared_materialized_is_the_baselines_architecture_and_computes_the_same(build, baseline, image, train):
    net = build(shared()).train(train)
    plain = materialize(net)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (plain, baseline)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    assert torch.equal(plain(image), net(image))


def test_shared_deepcopy_points_into_the_copy(build, image):
    net = build(shared()).eval()
    twin, before = copy.deepcopy(net), net(image)
    assert twin.layer2[2].before is twin.layer2[1]
    with torch.no_grad():
        twin.layer2[1].conv1.weight.zero_()
    assert not twin.layer2[2].synthesise()['conv1.weight'].any()
    assert torch.equal(net(image), before)


@pytest.mark.parametrize('side', ['left', None, 0])
def test_shared_unknown_side_names_the_allowed_ones(side):
    with pytest.raises(ValueError, match=f'SharedWeights: unknown side={side!r}; allowed: before, after'):
        SharedWeights(side)


@pytest.mark.parametrize('sample', [1, 0.125])
def test_shared_with_sample_is_refused_in_one_line_and_leaves_no_trace(toy_net, snapshot, sample):
    net = toy_net()
    modules, tensors, *rest = snapshot(net)
    with pytest.raises(ValueError, match='replacement.gradient: sample .*SharedWeights.* learns nothing; leave sample '
                                         'out') as caught:
        replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2), fusion=shared(), gradient=dict(sample=sample)))
    assert '\n' not in str(caught.value)
    now = snapshot(net)
    assert [now[0], *now[2:]] == [modules, *rest] and now[1].keys() == tensors.keys()


def test_shared_with_recompute_gives_the_same_gradients(build, gradients, assert_same, image):
    expected = gradients(build(shared(), mode='coupled').train(), image)
    assert_same(gradients(build(shared(), mode='coupled', memory='recompute').train(), image), expected)


def test_shared_repr_is_the_call():
    assert repr(SharedWeights('after', adapt=True)) == "SharedWeights(side='after', adapt=True)"


# OwnWeights(learn=False)

def test_fixed_blocks_get_no_gradient_and_all_others_do(build, gradients, image):
    net = build(FIXED).train()
    learned = set(gradients(net, image)) - {'out', 'input'}
    assert learned == {name for name, _ in net.named_parameters() if not name.startswith(REPLACED)}


@modes
def test_fixed_blocks_compute_what_the_baseline_does(build, baseline, image, train):
    net = build(FIXED)
    net.load_state_dict(baseline.state_dict())
    assert torch.equal(net.train(train)(image), baseline.train(train)(image))


def test_fixed_blocks_let_the_gradient_through(build, baseline, gradients, assert_same, image):
    """What lies before them learns as in the baseline."""
    net = build(FIXED).train()
    net.load_state_dict(baseline.state_dict())
    found, wanted = gradients(net, image), gradients(baseline.train(), image)
    assert_same(found, {name: wanted[name] for name in found})


@pytest.mark.parametrize('place', REPLACED)
def test_fixed_blocks_running_statistics_go_on(build, image, place):
    net = build(FIXED).train()
    before = copy.deepcopy(dict(net.get_submodule(place).named_buffers()))
    net(image)
    assert all(not torch.equal(buffer, before[name]) for name, buffer in net.get_submodule(place).named_buffers())


def test_fixed_blocks_have_the_baselines_state_dict(build, baseline):
    assert list(build(FIXED).state_dict()) == list(baseline.state_dict())


@pytest.mark.parametrize(('learn', 'expected'), [(False, [0, 0, 0]), (True, [308, 308, 308])])
def test_fixed_blocks_are_reported_to_learn_nothing(toy_net, learn, expected):
    report = replace_blocks_(toy_net(), dict(plan=dict(type='Blocks', blocks=BLOCKS), fusion=dict(FIXED, learn=learn)))
    assert [row.learnable for row in report.rows if row.replaced] == expected


@pytest.mark.parametrize('copied', [copy.deepcopy, materialize])
def test_fixed_blocks_stay_fixed_in_a_copy(build, copied):
    twin = copied(build(FIXED))
    assert not any(p.requires_grad for place in REPLACED for p in twin.get_submodule(place).parameters())


def test_fixed_blocks_of_a_light_operator_dont_learn_either(build, gradients, image):
    learned = gradients(build(FIXED, dict(type='DepthwiseBlock', scale=0.3)).train(), image)
    assert not [name for name in learned if name.startswith(REPLACED)]


@pytest.mark.parametrize('learn', [None, 0, 'no'])
def test_fixed_wrong_type_is_refused(learn):
    with pytest.raises(TypeError, match='OwnWeights: learn must be True or False'):
        OwnWeights(learn=learn)


# StochasticDepth

@pytest.fixture
def pair(build) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """A block that is left out at random and the same one that isn't, both of ``fusion``, in training mode."""
    def blocks(fusion: str, rate: float = P) -> tuple[nn.Module, nn.Module]:
        random, always = (build(fusion, operator).train().layer2[2] for operator in (depth(rate), None))
        always.load_state_dict(random.state_dict())
        return random, always
    return blocks


def left_out(block: nn.Module, always: nn.Module, *args: Any, rate: float = P) -> list[bool]:
    """Which images of the first argument the block leaves out; the others have to be scaled, to the last digit."""
    x, out, full = args[0], block(*args), always(*args)
    scaled = x + (full - x) / (1 - rate)
    torch.testing.assert_close(out, torch.stack([i if torch.equal(o, i) else s
                                                 for o, i, s in zip(out, x, scaled, strict=True)]))
    return [torch.equal(o, i) for o, i in zip(out, x, strict=True)]


def maps(batch: int) -> Tensor:
    return torch.randn(batch, 4, 3, 3, generator=torch.Generator().manual_seed(2)).double()


@fusions
def test_depth_in_eval_mode_the_block_always_runs(pair, fusion):
    block, always = (block.eval() for block in pair(fusion))
    assert torch.equal(block(maps(64)), always(maps(64)))


@fusions
def test_depth_in_training_each_image_is_left_out_or_scaled(pair, fusion):
    assert set(left_out(*pair(fusion), maps(32))) == {False, True}


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.8])
def test_depth_leaves_out_the_asked_part_of_the_images(pair, rate):
    found = left_out(*pair('OwnWeights', rate), maps(4000), rate=rate)
    assert sum(found) / 4000 == pytest.approx(rate, abs=0.03)


def test_depth_the_mean_of_many_draws_is_the_blocks_output(pair):
    block, always = pair('OwnWeights')
    x = maps(1).expand(4000, -1, -1, -1)
    mean, full = block(x).mean(0), always(x)[0]
    assert (mean - full).norm() < 0.04 * (full - x[0]).norm()


def test_depth_draws_anew_at_every_call(pair):
    block, always = pair('OwnWeights')
    assert left_out(block, always, maps(32)) != left_out(block, always, maps(32))


def test_depth_of_rate_zero_trains_as_the_baseline(build, baseline, gradients, assert_same, image):
    net = build('OwnWeights', depth(0)).train()
    net.load_state_dict(baseline.state_dict())
    assert_same(gradients(net, image), gradients(baseline.train(), image))


def test_depth_on_own_weights_has_the_baselines_state_dict_and_learns(build, baseline, gradients, image):
    net = build('OwnWeights', depth()).train()
    assert list(net.state_dict()) == list(baseline.state_dict())
    assert gradients(net, image).keys() == gradients(baseline.train(), image).keys()


def test_depth_on_fused_weights_the_coefficients_learn(build, gradients, image):
    found = gradients(build('ScalarFusion', depth()).train(), image)
    assert all(found[f'{place}.coeff'].any() for place in REPLACED)


def test_depth_an_image_that_is_left_out_gives_the_block_no_gradient(build, gradients, monkeypatch, image):
    monkeypatch.setattr(torch, 'rand', lambda *size, device: torch.zeros(size))
    found = gradients(build('ScalarFusion', depth()).train(), image)
    assert not any(found[f'{place}.coeff'].any() for place in REPLACED)


def test_depth_recomputed_the_same_images_are_left_out(build, gradients, assert_same, image):
    found = []
    for memory, seed in ((None, 5), ('recompute', 5), (None, 6)):
        net = build('ScalarFusion', depth(), memory=memory).train()
        torch.manual_seed(seed)
        found.append(gradients(net, image))
    assert_same(found[1], found[0])
    assert not torch.equal(found[2]['out'], found[0]['out'])


def test_depth_with_sample_one_has_the_exact_gradient(build, gradients, assert_same, monkeypatch, image):
    draws = torch.linspace(0, 1, len(image)).view(-1, 1, 1, 1)
    monkeypatch.setattr(torch, 'rand', lambda *size, device: draws)
    expected = gradients(build('ScalarFusion', depth()).train(), image)
    assert_same(gradients(build('ScalarFusion', depth(), sample=1).train(), image), expected)


@fusions
def test_depth_materialized_nothing_is_left_out_in_training_either(build, image, fusion):
    net, always = build(fusion, depth(0.9)).train(), build(fusion).train()
    plain = materialize(net)
    assert torch.equal(plain(image), materialize(always)(image))
    assert not torch.equal(net(image), always(image))


@fusions
def test_depth_a_copy_is_left_out_as_well(build, fusion):
    net, always = build(fusion, depth()).train(), build(fusion).train()
    assert set(left_out(copy.deepcopy(net).layer2[2], always.layer2[2], maps(32))) == {False, True}


def test_depth_blocks_that_change_the_width_are_refused(toy_net):
    net = toy_net()
    with pytest.raises(ValueError, match="layer1 block 0 can't be replaced: StochasticDepth can't leave out a Unit: it "
                                         "isn't known to keep the width and the stride"):
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'layer1': [0]}), operator=depth(),
                                  fusion=dict(type='OwnWeights', adapt=True)))
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(('block', 'reason'), [
    (lambda: BasicBlock(8, 8, stride=2), 'BasicBlock: it isn\'t known to keep the width and the stride'),
    (lambda: DetectorsBottleneck(16, 4), 'which its backbone also runs by rfp_forward()')])
def test_depth_other_blocks_that_it_cant_leave_out(block, reason):
    assert StochasticDepth(P).why_not(block()).endswith(reason)


@pytest.mark.parametrize('rate', [-0.1, 1, 1.5, float('nan'), False, '0.5', None])
def test_depth_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match='StochasticDepth: rate must be at least 0 and below 1, got'):
        StochasticDepth(rate)


@pytest.mark.parametrize('cfg', [
    dict(type='RLSwin', embed_dims=8, depths=(1, 1, 3, 1), num_heads=(1, 2, 2, 4), window_size=2, drop_path_rate=0.),
    dict(type='RLViT', arch=dict(embed_dim=24, num_heads=2, depth=3), img_size=32, window_size=2,
         drop_path_rate=0.),
    dict(type='RLBackbone', timm='vit_tiny_patch16_224', embed_dim=24, num_heads=2, depth=3),
], ids=['swin', 'vit', 'timm_vit'])
def test_depth_of_attention_blocks(cfg, randomise_):
    stage = 'stages.2.blocks' if cfg['type'] == 'RLSwin' else 'blocks'
    settings = dict(plan=dict(type='Blocks', blocks={stage: [1]}), fusion=dict(type='OwnWeights'))
    net, always = (randomise_(MODELS.build(dict(copy.deepcopy(cfg), replacement=dict(settings, operator=operator))))
                   for operator in (depth(), None))
    net.train()
    always.train()
    seen = []
    name = next(name for name, _ in net.named_modules() if name.endswith(f'{stage}.1'))
    net.get_submodule(name).register_forward_pre_hook(lambda block, args: seen.append(args))
    sum(out.square().mean() for out in net(torch.randn(16, 3, 64, 64))).backward()
    assert set(left_out(net.get_submodule(name), always.get_submodule(name), *seen[0])) == {False, True}


def test_depth_of_tridentnets_branches_each_for_itself():
    torch.manual_seed(0)
    net = MODELS.build(dict(
        type='RLBackbone', backbone='TridentResNet', depth=50, base_channels=4, num_branch=3, test_branch_idx=1,
        trident_dilations=(1, 2, 3), num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,),
        replacement=dict(plan=dict(type='Blocks', blocks={'layer3': [1]}), fusion=dict(type='OwnWeights'),
                         operator=depth(0.5))))
    net.init_weights()  # before it, TridentConv's weights are whatever is in memory
    net.train()
    kept = []
    net.layer3[1].register_forward_hook(lambda block, args, out: kept.append([
        [torch.equal(o, i) for o, i in zip(*branch, strict=True)] for branch in zip(out, args[0], strict=True)]))
    net(torch.randn(16, 3, 32, 32))
    assert len(kept[0]) == 3
    assert len({tuple(branch) for branch in kept[0]}) == 3


def test_depth_under_bfloat16_autocast():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(*(BasicBlock(8, 8) for _ in range(3))))
    replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'0': [1]}), operator=depth(0.5)))
    net.train()
    x = torch.randn(16, 8, 6, 6).bfloat16().relu()
    with torch.autocast('cpu', torch.bfloat16):
        out = net[0][1](x)
        net(x).float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    assert {torch.equal(o, i) for o, i in zip(out, x, strict=True)} == {False, True}
    assert net[0][1].coeff.grad.isfinite().all() and net[0][1].coeff.grad.any()


# As config options

@pytest.mark.parametrize('settings', [
    dict(fusion=shared('after'), gradient=dict(mode='coupled')),
    dict(fusion=FIXED),
    dict(fusion=dict(type='OwnWeights'), operator=depth()),
], ids=['shared', 'fixed', 'depth'])
def test_references_are_options_of_a_config(settings):
    net = MODELS.build(dict(type='RLResNet', depth=34, base_channels=4,
                            replacement=dict(settings, plan=dict(type='EveryKth', k=2))))
    net.init_weights()
    net.train()
    outs = net(torch.randn(2, 3, 32, 32))
    assert [tuple(out.shape[1:]) for out in outs] == [(4, 8, 8), (8, 4, 4), (16, 2, 2), (32, 1, 1)]
    sum(out.square().mean() for out in outs).backward()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)
    assert net.replacement_report.replaced['layer3'] == [1, 3]
