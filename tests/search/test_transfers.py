"""Transfers: which tensors of a pretrained backbone are updated."""
import copy

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

import rl_mmdet  # noqa: F401
from rl_mmdet.search import GradientNormSearch, TensorSearch, begin_search, searched_setting


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
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return sum((out - 0.1).square().mean() for out in net(x))


def run(net, steps, search, optimizer=None, per_step=1):
    """The search's part of a training; returns the gates of every step."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    handle = optimizer.register_step_pre_hook(lambda *_: search.look())
    gates = []
    for step in range(steps):
        gates.append(search.sample())
        loss(net, step).backward()
        if (step + 1) % per_step == 0:
            optimizer.step()
            search.learn()
            optimizer.zero_grad()
        else:
            search.learn()
    handle.remove()
    return gates


@pytest.mark.parametrize('transfer', [None, dict(type='Tensors', names=['layer3.0.conv1.weight', 'layer4.1.bn2.bias'])],
                         ids=['all', 'named'])
def test_exactly_the_named_tensors_learn(transfer):
    plain = backbone('ResNet')
    net = backbone(transfer=transfer)
    expected = set(learning(plain)) if transfer is None else set(transfer['names'])
    assert set(learning(net)) == expected
    assert list(net.state_dict()) == list(plain.state_dict())


def test_without_names_the_head_alone_learns():
    assert not learning(backbone(transfer=dict(type='Tensors')))


def test_stays_frozen_in_training_mode_and_through_loading():
    net = backbone(transfer=dict(type='Tensors', names=['layer3.0.conv1.weight']))
    net.load_state_dict(backbone('ResNet').state_dict())
    net.eval()
    net.train()
    assert set(learning(net)) == {'layer3.0.conv1.weight'}


@pytest.mark.parametrize('kind', ['ResNeXt', 'RegNet'])
def test_for_any_backbone(kind):
    more = dict(ResNeXt=dict(depth=50, groups=2, base_width=4), RegNet=dict(
        arch='regnetx_400mf', depth=None, base_channels=32))[kind]
    more = {key: value for key, value in more.items() if value is not None}
    given = dict(type='RLBackbone', backbone=kind, transfer=dict(type='RandomTensors', budget=0.2), **more)
    net = MODELS.build(given)
    assert 0.15 < size(learning(net).values()) / size(net.parameters()) <= 0.2


def test_with_replaced_blocks():
    net = backbone(depth=34, transfer=dict(type='SWR', budget=0.1), replacement=dict(plan=dict(type='EveryKth', k=2)))
    assert 'layer3.1.coeff' in begin_search(net, 4).base


def test_random_tensors_keep_the_budget_and_depend_on_the_seed():
    chosen = {}
    for seed in range(3):
        net = backbone(transfer=dict(type='RandomTensors', budget=0.1, seed=seed))
        chosen[seed] = set(learning(net))
        assert 0.09 < size(learning(net).values()) / size(net.parameters()) <= 0.1
        assert not any(name.startswith(('conv1', 'bn1', 'layer1')) for name in chosen[seed])
    assert len(set(map(frozenset, chosen.values()))) == 3
    assert set(learning(backbone(transfer=dict(type='RandomTensors', budget=0.1, seed=1)))) == chosen[1]


@pytest.mark.parametrize(('transfer', 'message'), [
    (dict(type='SWR', budget=1.0), r'SWR: budget must be above 0 and below 1, a part .* got 1\.0'),
    (dict(type='SWR', budget=True), 'budget must be above 0'),
    (dict(type='SWR'), "SWR needs the argument 'budget'"),
    (dict(type='SWR', budget=0.1, epochs=1, iters=2), 'epochs=1 and iters=2 both say how long'),
    (dict(type='SWR', budget=0.1, seed=-1), 'seed must be an integer of at least 0'),
    (dict(type='SWR', budget=1e-5), r'budget of \d parameters can\'t be reached: the smallest tensor has 8'),
    (dict(type='SWR', budget=0.999), 'learnable parameters are within the budget .* leave `transfer` out'),
    (dict(type='SWR', budget=0.1, steps=3), "SWR has no argument 'steps'; allowed: budget, epochs"),
    (dict(type='GradientNorm', budget=0.1, iters=0), 'GradientNorm: iters must be an integer of at least 1, got 0'),
    (dict(type='RandomTensors', budget=0.1, seed=1.5), 'seed must be'),
    (dict(type='Swr', budget=0.1), "unknown type 'Swr'; allowed: GradientNorm, RandomTensors, SWR, Tensors"),
    (dict(type='Tensors', names=['layer9.weight']), "no learnable tensor 'layer9.weight'; its tensors are called like "
                                                    r'layer2\.0\.conv1\.weight'),
    (dict(type='Tensors', names=['conv1.weight']), "no learnable tensor 'conv1.weight'"),  # it is frozen
])
def test_mistakes_are_named(transfer, message):
    with pytest.raises(ValueError, match=message) as caught:
        backbone(transfer=transfer)
    assert '\n' not in str(caught.value)
    assert 'transfer' in str(caught.value)


def test_other_mistakes():
    with pytest.raises(TypeError, match='Tensors: names must be a list of parameter names'):
        backbone(transfer=dict(type='Tensors', names='conv1.weight'))
    with pytest.raises(TypeError, match="transfer must be a dict such as dict\\(type='SWR'"):
        backbone(transfer='SWR')
    with pytest.raises(ValueError, match='has no learnable tensor to choose; is all of it frozen'):
        backbone(transfer=dict(type='SWR', budget=0.1), frozen_stages=4)
    with pytest.raises(ValueError, match='are two searches; learn the plan first'):
        backbone(depth=34, transfer=dict(type='SWR', budget=0.1),
                 replacement=dict(plan=dict(type='LearnedPlan', budget=dict(params=0.9))))


# The search

def test_the_model_is_the_pretrained_one_plus_the_gated_updates():
    net = backbone(transfer=dict(type='SWR', budget=0.2))
    base = copy.deepcopy(net.state_dict())
    search = begin_search(net, 20)
    assert isinstance(search, TensorSearch)
    run(net, 5, search)
    gates = search.sample()
    assert {True, False} == set(gates)
    for name, gate in zip(search.base, gates, strict=True):
        value = net.get_parameter(name)
        assert torch.equal(value, search.tuned[name] if gate else base[name])
        assert torch.equal(search.base[name], base[name])
    assert any(not torch.equal(search.tuned[name], base[name]) for name in search.base)


def test_closed_tensors_are_left_alone_by_the_optimizer():
    net = backbone(transfer=dict(type='SWR', budget=0.2))
    search = begin_search(net, 20)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    [gates] = run(net, 1, search, optimizer)
    for (name, parameter), gate in zip(search.parameters.items(), gates, strict=True):
        assert (parameter in optimizer.state) == gate
        assert torch.equal(search.tuned[name], search.base[name]) != gate


def test_the_gradient_at_a_gate_is_that_of_the_update():
    """Against finite differences of the loss along W + g·Δ, in float64."""
    net = backbone(transfer=dict(type='SWR', budget=0.2)).double()
    search = begin_search(net, 20)
    run_in_double = torch.optim.SGD(net.parameters(), 0.05)
    handle = run_in_double.register_step_pre_hook(lambda *_: search.look())

    def value():
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
        return sum((out - 0.1).square().mean() for out in net(x))

    for _ in range(3):
        search.sample()
        value().backward()
        run_in_double.step()
        search.learn()
        run_in_double.zero_grad()
    search.sample()
    value().backward()
    search.look()
    handle.remove()
    for index in (0, 7, 20):
        name = list(search.base)[index]
        update, parameter, step = search.tuned[name] - search.base[name], search.parameters[name], 1e-4
        with torch.no_grad():
            before = parameter.clone()
            slopes = [value() for sign in (1, -1) if parameter.copy_(before + sign * step * update) is not None]
            parameter.copy_(before)
        numeric = (slopes[0] - slopes[1]) / (2 * step)
        assert search.gradient[index].item() == pytest.approx(numeric.item(), rel=1e-3, abs=1e-9)


def test_gates_stay_while_gradients_are_accumulated():
    net = backbone(transfer=dict(type='SWR', budget=0.2))
    search = begin_search(net, 12)
    gates = run(net, 12, search, per_step=3)
    assert [gates[i] == gates[i + 1] for i in range(11)] == [True, True, False] * 3 + [True, True]
    assert search.done


def test_at_the_end_the_budget_is_used_and_all_else_is_pretrained():
    net = backbone(transfer=dict(type='SWR', budget=0.1))
    base = copy.deepcopy(net.state_dict())
    average = copy.deepcopy(net)
    search = begin_search(net, 30)
    run(net, 30, search)
    assert search.done and search.settled == len(search.base)
    for parameter in average.parameters():
        parameter.data += 1
    found = search.conclude_(average)
    names = found.setting['transfer']['names']
    assert found.setting['transfer']['type'] == 'Tensors' and set(learning(net)) == set(names)
    assert 0.099 <= size(learning(net).values()) / size(net.parameters()) <= 0.1
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, search.tuned[name] if name in names else base[name]), name
        assert parameter.grad is None
        frozen = name not in names and name in search.base
        assert torch.equal(average.get_parameter(name), base[name]) == frozen
    assert any(not torch.equal(net.get_parameter(name), base[name]) for name in names)
    assert searched_setting(net) is None
    again = backbone(transfer=found.setting['transfer'])
    assert set(learning(again)) == set(names)


class TwoTensors(nn.Module):
    """Only one of the tensors has something to learn."""

    def __init__(self):
        super().__init__()
        self.useful, self.useless = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.useful(x) + 0 * self.useless(x)


@pytest.mark.parametrize('kind', ['SWR', 'GradientNorm'])
def test_what_helps_is_chosen(kind):
    from rl_mmdet.replacement.registry import TRANSFERS
    torch.manual_seed(0)
    net = TwoTensors()
    net.transfer = TRANSFERS.get(kind)(0.5)
    search = begin_search(net, 60)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.register_step_pre_hook(lambda *_: search.look())
    while not search.done:
        search.sample()
        x = torch.randn(8, 4)
        (net(x) - 2 * x).square().mean().backward()
        optimizer.step()
        search.learn()
        optimizer.zero_grad()
    assert search.conclude_().setting['transfer']['names'] == ['useful.weight']


@pytest.mark.parametrize('kind', ['SWR', 'GradientNorm'])
def test_a_resumed_search_goes_on_with_the_same_gates(kind, tmp_path):
    more = dict(iters=16) if kind == 'GradientNorm' else {}
    net = backbone(transfer=dict(type=kind, budget=0.1, **more))
    search, optimizer = begin_search(net, 16), torch.optim.SGD(net.parameters(), 0.05)
    run(net, 6, search, optimizer)
    torch.save(search.state_dict(), tmp_path / 'state.pth')
    other = backbone(transfer=dict(type=kind, budget=0.1, **more))
    resumed = begin_search(other, 16)
    resumed.load_state_dict(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert run(other, 10, resumed, torch.optim.SGD(other.parameters(), 0.05)) == run(net, 10, search, optimizer)
    assert resumed.best() == search.best()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize('kind', ['SWR', 'GradientNorm'])
def test_a_state_of_another_search_is_refused(kind):
    state = begin_search(backbone(transfer=dict(type=kind, budget=0.1)), 16).state_dict()
    with pytest.raises(ValueError, match='16 steps and would now take 17'):
        begin_search(backbone(transfer=dict(type=kind, budget=0.1)), 17).load_state_dict(state)
    with pytest.raises(ValueError, match='for other tensors'):
        begin_search(backbone(transfer=dict(type=kind, budget=0.1), depth=34), 16).load_state_dict(state)


def test_gradient_norm_learns_nothing_but_where_before_it_chooses():
    net = backbone(transfer=dict(type='GradientNorm', budget=0.1, iters=5))
    base = copy.deepcopy(net.state_dict())
    search = begin_search(net, 5)
    assert isinstance(search, GradientNormSearch)
    run(net, 5, search)
    assert all(torch.equal(value, base[name]) for name, value in net.state_dict().items())
    names = search.conclude_().setting['transfer']['names']
    largest = max(search.norms, key=search.norms.get)
    assert largest in names
    assert 0.09 < size(learning(net).values()) / size(net.parameters()) <= 0.1
