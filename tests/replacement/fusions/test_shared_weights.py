"""SharedWeights: a neighbour's weights as they are, against an ordinary model that uses a module several times."""
import pytest
import torch

from rl_mmdet.replacement import adapt_state_dict, computing_layers, materialize, replace_blocks_
from rl_mmdet.replacement.fusions import SharedWeights

NEIGHBOURS = {'before': {'layer1.1': 'layer1.0', 'layer2.2': 'layer2.1', 'layer2.3': 'layer2.1'},
              'after': {'layer1.1': 'layer1.2', 'layer2.2': 'layer2.4', 'layer2.3': 'layer2.4'}}
"""Whose tensors a replaced block has, but for layer1.1.conv1.weight, which layer1.0 has in another size."""
sides = pytest.mark.parametrize('side', NEIGHBOURS)


@pytest.fixture
def build(replaced):
    """A ToyNet in float64 whose replaced blocks share a neighbour's weights."""
    return lambda side='before', mode='detached', **settings: replaced(
        fusion=dict(type='SharedWeights', side=side), gradient=dict(mode=mode, every=1), **settings).double()


@pytest.fixture
def baseline(toy_net, randomise_):
    return randomise_(toy_net()).double()


@sides
@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_computes_with_the_neighbours_weights_in_its_place(build, baseline, image, side, train):
    net = build(side)
    state = net.state_dict()
    for place, neighbour in NEIGHBOURS[side].items():
        for name, _ in baseline.get_submodule(place).named_parameters():
            source = 'layer1.2' if f'{place}.{name}' == 'layer1.1.conv1.weight' else neighbour
            state[f'{place}.{name}'] = state[f'{source}.{name}']
    baseline.load_state_dict(state)
    expected = baseline.train(train)(image.double())
    plain = materialize(net).train(train)
    assert list(plain.state_dict()) == list(state := baseline.state_dict())
    assert torch.equal(net.train(train)(image.double()), expected)
    assert torch.equal(plain(image.double()), expected)


def test_learns_nothing_and_says_so(toy_net, build):
    assert not [p for layer in computing_layers(build()).values() for p in layer.parameters()]
    report = replace_blocks_(toy_net(), dict(plan=dict(type='EveryKth', k=2), fusion=dict(type='SharedWeights')))
    assert report.learnable == 0
    assert repr(SharedWeights('after', adapt=True)) == "SharedWeights(side='after', adapt=True)"


@pytest.mark.parametrize(('side', 'neighbour'), [('before', 1), ('after', 4)])
def test_coupled_it_learns_as_a_module_that_is_used_three_times(build, toy_net, gradients, assert_same, image, side,
                                                                neighbour):
    net = build(side, 'coupled', blocks={'layer2': [2, 3]}).train()
    expected = toy_net().double()
    expected.load_state_dict(net.state_dict(), strict=False)
    for index in (2, 3):
        expected.layer2[index] = expected.layer2[neighbour]
    wanted = gradients(expected.train(), image.double())  # under the name of the first of the three places
    assert_same(gradients(net, image.double()), {name.replace('layer2.2.', f'layer2.{neighbour}.'): value
                                                 for name, value in wanted.items()})


def test_detached_the_neighbour_learns_from_its_own_place_only(build, gradients, assert_same, image):
    net = build().train()
    found, wanted = gradients(net, image.double()), gradients(materialize(net), image.double())
    assert_same(found, {name: wanted[name] for name in found})


@sides
def test_takes_a_baselines_state_dict(build, baseline, assert_same_state, side):
    net, state = build(side), baseline.state_dict()
    _, report = adapt_state_dict(net, state)
    assert report.initialised == list(NEIGHBOURS[side])
    result = net.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_state(net.state_dict(), {key: state[key] for key in net.state_dict()})


@pytest.mark.parametrize('side', ['left', None])
def test_unknown_side_names_the_allowed_ones(side):
    with pytest.raises(ValueError, match=f'SharedWeights: unknown side={side!r}; allowed: before, after'):
        SharedWeights(side)
