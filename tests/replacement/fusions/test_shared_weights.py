"""SharedWeights: the weights of the block before, against an ordinary model that uses a module several times."""
import pytest
import torch

from rl_mmdet.replacement import adapt_state_dict, computing_layers, materialize, replace_blocks_
from rl_mmdet.replacement.fusions import SharedWeights

NEIGHBOURS = {'layer1.1': 'layer1.0', 'layer2.2': 'layer2.1', 'layer2.3': 'layer2.1'}
"""Whose tensors a replaced block has, but for layer1.1.conv1.weight, which layer1.0 has in another size."""


@pytest.fixture
def build(replaced):
    """A ToyNet in float64 whose replaced blocks share the weights of the block before."""
    return lambda mode='detached', **settings: replaced(
        fusion=dict(type='SharedWeights'), gradient=dict(mode=mode, every=1), **settings).double()


@pytest.fixture
def baseline(toy_net, randomise_):
    return randomise_(toy_net()).double()


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_computes_with_the_neighbours_weights_in_its_place(build, baseline, image, train):
    net = build()
    state = net.state_dict()
    for place, neighbour in NEIGHBOURS.items():
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
    assert repr(SharedWeights(adapt=True)) == 'SharedWeights(adapt=True)'


def test_coupled_it_learns_as_a_module_that_is_used_three_times(build, toy_net, gradients, assert_same, image):
    net = build('coupled', blocks={'layer2': [2, 3]}).train()
    expected = toy_net().double()
    expected.load_state_dict(net.state_dict(), strict=False)
    for index in (2, 3):
        expected.layer2[index] = expected.layer2[1]
    wanted = gradients(expected.train(), image.double())
    assert_same(gradients(net, image.double()), wanted)


def test_detached_the_neighbour_learns_from_its_own_place_only(build, gradients, assert_same, image):
    net = build().train()
    found, wanted = gradients(net, image.double()), gradients(materialize(net), image.double())
    assert_same(found, {name: wanted[name] for name in found})


def test_takes_a_baselines_state_dict(build, baseline, assert_same_state):
    net, state = build(), baseline.state_dict()
    _, report = adapt_state_dict(net, state)
    assert report.initialised == list(NEIGHBOURS)
    result = net.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_state(net.state_dict(), {key: state[key] for key in net.state_dict()})
