"""OwnWeights: no fusion, and with ``learn=False`` blocks that stay as they are."""
import copy

import pytest
import torch

from rl_mmdet.replacement import computing_layers, materialize, replace_blocks_
from rl_mmdet.replacement.fusions import OwnWeights

REPLACED = ('layer1.1', 'layer2.2', 'layer2.3')


@pytest.fixture
def build(replaced):
    return lambda learn=False, operator=None: replaced(fusion=dict(type='OwnWeights', learn=learn), operator=operator)


@pytest.fixture
def baseline(toy_net, randomise_):
    return randomise_(toy_net())


def test_weights_start_as_the_average_of_the_neighbours(toy_net):
    net = toy_net()
    replace_blocks_(net, dict(plan=dict(type='EveryKth', k=4), fusion=dict(type='OwnWeights')))
    expected = (net.layer2[0].conv1.weight + net.layer2[2].conv1.weight) / 2
    assert not computing_layers(net)
    torch.testing.assert_close(net.layer2[1].conv1.weight, expected)


@pytest.mark.parametrize(('learn', 'learnable'), [(False, [0, 0, 0]), (True, [308, 308, 308])])
def test_it_is_the_baseline_whose_replaced_blocks_may_be_fixed(build, baseline, toy_net, gradients, assert_same, image,
                                                               learn, learnable):
    net = build(learn).train()
    assert list(net.state_dict()) == list(baseline.state_dict())
    net.load_state_dict(baseline.state_dict())
    found, wanted = gradients(net, image), gradients(baseline.train(), image)
    assert set(wanted) - set(found) == {name for name in wanted if not learn and name.startswith(REPLACED)}
    assert_same(found, {name: wanted[name] for name in found}, 1e-6)
    for name, buffer in net.named_buffers():  # running statistics go on
        assert torch.equal(buffer, baseline.get_buffer(name))
    report = replace_blocks_(toy_net(), dict(plan=dict(type='Blocks', blocks={'layer1': [1], 'layer2': [2, 3]}),
                                             fusion=dict(type='OwnWeights', learn=learn)))
    assert [row.learnable for row in report.rows if row.replaced] == learnable


@pytest.mark.parametrize('operator', [None, dict(type='SlimBlock', scale=0.3)])
@pytest.mark.parametrize('copied', [copy.deepcopy, materialize])
def test_fixed_blocks_stay_fixed_in_a_copy_and_with_every_operator(build, copied, operator):
    twin = copied(build(operator=operator))
    assert not any(p.requires_grad for place in REPLACED for p in twin.get_submodule(place).parameters())


def test_wrong_learn_is_refused():
    with pytest.raises(TypeError, match="OwnWeights: learn must be True or False, got 'no'"):
        OwnWeights(learn='no')
