"""Transfers: which tensors of a pretrained backbone are updated, and the search that learns it."""
import copy
import re

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

import rl_mmdet  # noqa: F401
from rl_mmdet.search import TRANSFERS, begin_search, searched_setting

SWR = dict(type='SWR', budget=0.2)


def backbone(kind='RLResNet', **more):
    torch.manual_seed(0)
    net = MODELS.build(dict(dict(type=kind, depth=18, base_channels=4, norm_eval=True, frozen_stages=1), **more))
    net.train()
    return net


def size(parameters):
    return sum(p.numel() for p in parameters)


def learning(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def loss(net, seed=0):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(next(net.parameters()))
    return sum((out - 0.1).square().mean() for out in net(x))


def run(net, steps, search, optimizer=None, per_step=1):
    """The search's part of a training; returns the gates of every step."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    gates = []
    for step in range(steps):
        gates.append(search.sample())
        loss(net, step).backward()
        if (step + 1) % per_step == 0:
            search.look()  # torch 2.1 runs no optimizer's hooks in a process that has compiled something
            optimizer.step()
        search.learn()
        if (step + 1) % per_step == 0:
            optimizer.zero_grad()
    return gates


@pytest.mark.parametrize('names', [None, [], ['layer3.0.conv1.weight', 'layer4.1.bn2.bias']], ids=str)
def test_exactly_the_named_tensors_learn(names):
    """Through loading and changes of mode."""
    plain = backbone('ResNet')
    net = backbone(transfer=None if names is None else dict(type='Tensors', names=names))
    net.load_state_dict(plain.state_dict())
    net.eval()
    net.train()
    assert set(learning(net)) == set(learning(plain) if names is None else names)


def test_replaced_blocks_are_searched_as_well():
    net = backbone(depth=34, transfer=SWR, replacement=dict(plan=dict(type='EveryKth', k=2)))
    assert 'layer3.1.coeff' in begin_search(net, 4).base


@pytest.mark.parametrize(('transfer', 'message'), [
    (dict(type='SWR', budget=1.0), r'SWR: budget must be a number above 0 and below 1, got 1\.0 \(a share of the'),
    (dict(type='SWR', budget=True), 'budget must be a number above 0'),
    (dict(type='SWR'), "SWR needs the argument 'budget'"),
    (dict(type='SWR', budget=0.1, epochs=1, iters=2), 'SWR: epochs=1 and iters=2 both say how long'),
    (dict(type='SWR', budget=0.1, seed=-1), 'seed must be an integer of at least 0'),
    (dict(type='SWR', budget=1e-5), r'budget of \d parameters can\'t be reached: the smallest tensor has 8'),
    (dict(type='SWR', budget=0.999), 'learnable parameters are within the budget .* leave `transfer` out'),
    (dict(type='SWR', budget=0.1, steps=3), "SWR has no argument 'steps'; allowed: budget, epochs"),
    (dict(type='Swr', budget=0.1), "unknown type 'Swr'; allowed: SWR, Tensors"),
    (dict(type='Tensors', names=['layer9.weight']), "no learnable tensor 'layer9.weight'; its tensors are called like "
                                                    r'layer2\.0\.conv1\.weight'),
    (dict(type='Tensors', names=['conv1.weight']), "no learnable tensor 'conv1.weight'"),  # it is frozen
    (dict(type='Tensors', names='conv1.weight'), 'Tensors: names must be a list of parameter names'),
    ('SWR', r"transfer must be a dict such as dict\(type='SWR'"),
], ids=str)
def test_mistakes_are_named_in_one_line(transfer, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        backbone(transfer=transfer)
    assert re.fullmatch('transfer.*', str(caught.value))


def test_a_transfer_that_does_not_fit_the_backbone():
    with pytest.raises(ValueError, match='has no learnable tensor to choose; is all of it frozen'):
        backbone(transfer=SWR, frozen_stages=4)
    with pytest.raises(ValueError, match='are two searches; learn the plan first'):
        backbone(depth=34, transfer=SWR,
                 replacement=dict(plan=dict(type='LearnedPlan', budget=dict(params=0.9))))


# The search

def test_the_model_is_the_pretrained_one_plus_the_gated_updates():
    net = backbone(transfer=SWR)
    base, optimizer = copy.deepcopy(net.state_dict()), torch.optim.AdamW(net.parameters(), 0.01)
    search = begin_search(net, 20)
    [first] = run(net, 1, search, optimizer)
    assert [parameter in optimizer.state for parameter in search.parameters.values()] == first  # the others are hidden
    run(net, 3, search, optimizer)
    gates = search.sample()
    assert {True, False} == set(gates)
    for name, gate in zip(search.base, gates, strict=True):
        assert torch.equal(search.base[name], base[name])
        assert torch.equal(net.get_parameter(name), search.tuned[name] if gate else base[name])
    assert any(not torch.equal(search.tuned[name], base[name]) for name in search.base)


def test_the_gradient_at_a_gate_is_that_of_the_update():
    """Against finite differences of the loss along W + g·Δ, in float64."""
    net = backbone(transfer=SWR).double()
    search = begin_search(net, 20)
    run(net, 3, search)
    search.sample()
    loss(net).backward()
    search.look()
    for index in (0, 7, 20):
        name = list(search.base)[index]
        update, parameter, step, slopes = search.tuned[name] - search.base[name], search.parameters[name], 1e-4, []
        with torch.no_grad():
            before = parameter.clone()
            for sign in (1, -1):
                parameter.copy_(before + sign * step * update)
                slopes.append(loss(net).item())
            parameter.copy_(before)
        numeric = (slopes[0] - slopes[1]) / (2 * step)
        assert search.gradient[index].item() == pytest.approx(numeric, rel=1e-3, abs=1e-9)


def test_gates_stay_while_gradients_are_accumulated():
    net = backbone(transfer=SWR)
    search = begin_search(net, 12)
    gates = run(net, 12, search, per_step=3)
    assert [gates[i] == gates[i + 1] for i in range(11)] == [True, True, False] * 3 + [True, True]
    assert search.done


def test_at_the_end_the_budget_is_used_and_all_else_is_pretrained():
    net = backbone(transfer=dict(type='SWR', budget=0.1))
    base, average = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    search = begin_search(net, 16)
    run(net, 16, search)
    assert search.done and search.num_settled == len(search.base)
    for parameter in average.parameters():
        parameter.data += 1
    found = search.conclude_(average).found
    names = found['transfer']['names']
    assert found['transfer']['type'] == 'Tensors' and set(learning(net)) == set(names)
    assert 0.099 <= size(learning(net).values()) / size(net.parameters()) <= 0.1
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, search.tuned[name] if name in names else base[name]), name
        assert parameter.grad is None
        frozen = name not in names and name in search.base
        assert torch.equal(average.get_parameter(name), base[name]) == frozen
    assert any(not torch.equal(net.get_parameter(name), base[name]) for name in names)
    assert searched_setting(net) is None
    assert set(learning(backbone(transfer=found['transfer']))) == set(names)


class TwoTensors(nn.Module):
    """Only one of the tensors has something to learn."""

    def __init__(self):
        super().__init__()
        self.useful, self.useless = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.useful(x) + 0 * self.useless(x)


def test_what_helps_is_chosen():
    net = TwoTensors()
    net.transfer = TRANSFERS.get('SWR')(0.5)
    search = begin_search(net, 60)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    while not search.done:
        search.sample()
        x = torch.randn(8, 4)
        (net(x) - 2 * x).square().mean().backward()
        search.look()
        optimizer.step()
        search.learn()
        optimizer.zero_grad()
    assert search.scalars()['useful.weight'] > search.scalars()['useless.weight']
    assert search.conclude_().found['transfer']['names'] == ['useful.weight']


def test_a_resumed_search_goes_on_with_the_same_gates(tmp_path):
    def start():
        net = backbone(transfer=dict(type='SWR', budget=0.1))
        return net, begin_search(net, 10), torch.optim.SGD(net.parameters(), 0.05)

    net, search, optimizer = start()
    run(net, 6, search, optimizer)
    torch.save(search.state_dict(), tmp_path / 'state.pth')
    other, resumed, another = start()
    resumed.load_state_dict(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert run(other, 4, resumed, another) == run(net, 4, search, optimizer)
    assert resumed.best() == search.best()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
