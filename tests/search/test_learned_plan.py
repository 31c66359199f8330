"""LearnedPlan and RandomPlan: what they accept, what their budgets mean, and which choices keep them."""
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.models.backbones.resnet import Bottleneck
from torch import Tensor, nn

from rl_mmdet.replacement import computing_layers, find_chains, replace_blocks_
from rl_mmdet.replacement.plans import Blocks
from rl_mmdet.replacement.plans.trial import forward_flops
from rl_mmdet.replacement.saved_bytes import saved_bytes
from rl_mmdet.search import BlockSearch, LearnedPlan, RandomPlan
from rl_mmdet.search.search_space import finish_search_

plans = pytest.mark.parametrize('plan', [LearnedPlan, RandomPlan])
SIZE = (32, 32)


class ResNet(nn.Module):
    """Two stages of bottlenecks, the second one wider."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.layer1 = nn.Sequential(*(Bottleneck(16, 4) for _ in range(5)))
        self.reduce = nn.Conv2d(16, 32, 1, 2)
        self.layer2 = nn.Sequential(*(Bottleneck(32, 8) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.reduce(self.layer1(self.stem(x))))


@pytest.fixture
def resnet() -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return ResNet()
    return build


# Arguments

@plans
@pytest.mark.parametrize(('budget', 'message'), [
    (0.7, 'budget must be a dict with one of params, flops, saved_bytes, such as dict(params=0.7), got 0.7'),
    ({}, 'budget must be a dict with one of params, flops, saved_bytes, such as dict(params=0.7), got {}'),
    (dict(memory=0.5), 'budget must be a dict with one of params, flops, saved_bytes, such as dict(params=0.7), got '
                       "{'memory': 0.5}"),
    (dict(params=0.5, flops=0.5), 'budget must be a dict with one of params, flops, saved_bytes, such as '
                                  "dict(params=0.7), got {'params': 0.5, 'flops': 0.5}"),
    *((dict(flops=part), f"budget.flops must be above 0 and below 1, a part of the unreplaced model's forward FLOPs, "
                         f'got {part!r}') for part in (0, 1, 1.2, -0.3, '0.5', None, True, float('nan'))),
])
def test_wrong_budget_is_refused(plan, budget, message):
    with pytest.raises(ValueError) as error:
        plan(budget)
    assert str(error.value) == f'{plan.__name__}: {message}'


@plans
@pytest.mark.parametrize('size', [64, (64,), (64, 0), (64, 64.), '64', None, (64, 64, 64), (True, 64)], ids=str)
def test_wrong_image_size_is_refused(plan, size):
    with pytest.raises(ValueError) as error:
        plan(dict(flops=0.5), image_size=size)
    assert str(error.value) == (f'{plan.__name__}: image_size must be (height, width) in pixels, two positive '
                                f'integers, got {size!r}')


@plans
@pytest.mark.parametrize('seed', [-1, 1.5, '1', None, True])
def test_wrong_seed_is_refused(plan, seed):
    with pytest.raises(ValueError) as error:
        plan(dict(params=0.5), seed=seed)
    assert str(error.value) == f'{plan.__name__}: seed must be an integer of at least 0, got {seed!r}'


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(epochs=1, iters=5), 'epochs=1 and iters=5 both say how long the search is; leave one out'),
    *((dict(epochs=n), f'epochs must be an integer of at least 1, got {n!r}') for n in (0, -1, 1.5, '2', True)),
    *((dict(iters=n), f'iters must be an integer of at least 1, got {n!r}') for n in (0, 1.5)),
    *((dict(temperature=t), f'temperature must be two numbers above 0, got {t!r}')
      for t in (1., (1.,), (1., 0), (1., -1.), '12', (1., None), (1., 0.5, 0.2))),
    *((dict(lr=lr), f'lr must be a number above 0, got {lr!r}') for lr in (0, -0.1, '0.1', None, True)),
], ids=str)
def test_wrong_settings_of_the_search_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        LearnedPlan(dict(params=0.5), **settings)
    assert str(error.value) == f'LearnedPlan: {message}'


def test_plans_show_their_settings():
    assert repr(LearnedPlan(dict(params=0.7))) == 'LearnedPlan(budget=dict(params=0.7))'
    assert repr(LearnedPlan(dict(flops=0.7), iters=9)) == 'LearnedPlan(budget=dict(flops=0.7), iters=9)'
    assert repr(RandomPlan(dict(flops=0.7), 3)) == 'RandomPlan(budget=dict(flops=0.7), seed=3)'


def test_random_plan_needs_the_model(resnet):
    with pytest.raises(ValueError, match='^RandomPlan: it measures the model, so it needs one'):
        RandomPlan(dict(params=0.7)).choose(find_chains(resnet()))


# Budgets

def measure(model: nn.Module, quantity: str) -> float:
    """The quantity of a model, counted here."""
    if quantity == 'flops':
        return forward_flops(model.eval(), SIZE)
    if quantity == 'saved_bytes':
        model.train()
        return saved_bytes(model, lambda: model(torch.zeros(1, 3, *SIZE)))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


BUDGETS = {
    'params': (dict(params=0.65), {}),
    'flops': (dict(flops=0.65), dict(operator=dict(type='SlimBlock'))),
    'saved_bytes': (dict(saved_bytes=0.95), dict(gradient=dict(sample=0.125))),
}
budgets = pytest.mark.parametrize('quantity', BUDGETS)


def replacement(plan: str, quantity: str, **more: Any) -> dict[str, Any]:
    budget, settings = BUDGETS[quantity]
    size = {} if quantity == 'params' else dict(image_size=SIZE)
    return dict(settings, plan=dict(type=plan, budget=budget, **size, **more))


def part_of(model: nn.Module, baseline: nn.Module, quantity: str) -> float:
    return measure(model, quantity) / measure(baseline, quantity)


@budgets
def test_savings_are_measured(resnet, quantity):
    model, baseline = resnet(), resnet()
    replace_blocks_(model, replacement('LearnedPlan', quantity))
    space = model.search_space
    for place, saving in zip(space.places, space.savings, strict=True):
        alone = resnet()
        replace_blocks_(alone, dict(BUDGETS[quantity][1], plan=Blocks({place.chain.name: [place.index]})))
        assert saving == pytest.approx(1 - part_of(alone, baseline, quantity))
        assert saving > 0


@budgets
def test_the_search_ends_with_the_budget_kept(resnet, quantity):
    model, baseline = resnet(), resnet()
    replace_blocks_(model, replacement('LearnedPlan', quantity))
    search = BlockSearch(model, 4)
    while not search.done:
        search.sample()
        model(torch.randn(1, 3, *SIZE)).square().sum().backward()
        search.learn()
    choice, left = search.decide()
    finish_search_(model, choice)
    part = BUDGETS[quantity][0][quantity]
    assert left <= part
    assert left == pytest.approx(part_of(model, baseline, quantity))


@budgets
@pytest.mark.parametrize('seed', [0, 1])
def test_random_plan_keeps_the_budget_with_no_block_too_many(resnet, quantity, seed):
    model, baseline = resnet(), resnet()
    report = replace_blocks_(model, replacement('RandomPlan', quantity, seed=seed))
    part = BUDGETS[quantity][0][quantity]
    assert part_of(model, baseline, quantity) <= part
    for name in computing_layers(model):
        chain, index = name.split('.')
        fewer = {key: [i for i in blocks if (key, i) != (chain, int(index))] for key, blocks in report.replaced.items()}
        if any(fewer.values()):
            less = resnet()
            replace_blocks_(less, dict(BUDGETS[quantity][1], plan=Blocks(fewer)))
            assert part_of(less, baseline, quantity) > part


def test_random_plan_depends_on_its_seed(resnet):
    found = [replace_blocks_(resnet(), replacement('RandomPlan', 'params', seed=seed)).replaced
             for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert len({str(choice) for choice in found}) >= 2


def test_random_plan_shows_its_choice_as_a_plan(resnet):
    report = replace_blocks_(resnet(), replacement('RandomPlan', 'params'))
    assert f'the same choice as a plan: {report.as_plan}' in str(report)


def test_measuring_leaves_the_model_as_it_is(resnet):
    """But for the gates: weights, statistics and modes."""
    model, plain = resnet().train(), resnet().train()
    torch.manual_seed(0)
    replace_blocks_(model, replacement('LearnedPlan', 'saved_bytes'))
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert all(module.training for module in model.modules())


# What can't be

LEFT = "blocks replaced, all that save something, {} of the unreplaced model's {} are left"
SLIM, SAMPLED = dict(operator=dict(type='SlimBlock')), dict(gradient=dict(sample=0.125))


@plans
@pytest.mark.parametrize(('budget', 'settings', 'message'), [
    (dict(params=0.1), {}, 'with 5 ' + LEFT.format(r'0\.\d{3}', 'learnable parameters')),
    (dict(flops=0.9), {}, r'with \d ' + LEFT.format(r'\d\.\d{3}', 'forward FLOPs')
     + '; FullBlock computes all that the removed block did: take a light operator'),
    (dict(flops=0.05), SLIM, 'with 5 ' + LEFT.format(r'0\.\d{3}', 'forward FLOPs')),
    (dict(saved_bytes=0.9), {}, r'with \d ' + LEFT.format(r'\d\.\d{3}', 'bytes saved for backward')
     + r'; plain autograd keeps the weights that are made: add gradient=dict\(sample=0.125\)'),
    (dict(saved_bytes=0.05), SAMPLED, 'with 5 ' + LEFT.format(r'0\.\d{3}', 'bytes saved for backward')),
], ids=['params', 'flops of FullBlock', 'flops', 'saved_bytes of autograd', 'saved_bytes'])
def test_budget_that_cant_be_reached(resnet, snapshot, plan, budget, settings, message):
    model = resnet()
    before = snapshot(model)
    given = repr(plan(budget)).replace('(', r'\(').replace(')', r'\)')
    with pytest.raises(ValueError, match=f"^replacement.plan: {given}: the budget can't be reached: {message}$"):
        replace_blocks_(model, dict(settings, plan=dict(type=plan.__name__, budget=budget, image_size=SIZE)))
    assert_same(snapshot(model), before)


def assert_same(after: tuple, before: tuple) -> None:
    modules, tensors, *more = after
    assert (modules, *more) == (before[0], *before[2:])
    assert list(tensors) == list(before[1])
    assert all(torch.equal(value, before[1][key]) for key, value in tensors.items())


@plans
def test_model_without_chains(snapshot, plan):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r'^replacement.plan: the model has no chain of blocks'):
        replace_blocks_(model, dict(plan=dict(type=plan.__name__, budget=dict(params=0.7))))
    assert_same(snapshot(model), before)


@plans
def test_model_without_blocks_that_can_be_replaced(resnet, snapshot, plan):
    model = resnet()
    model.layer1, model.layer2 = model.layer1[:2], model.layer2[:2]
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf'^replacement.plan: {plan.__name__}\(.*\) replaces no block of this model; '
                                         r'blocks that can be replaced: none \(no kept block'):
        replace_blocks_(model, dict(plan=dict(type=plan.__name__, budget=dict(params=0.7))))
    assert_same(snapshot(model), before)


@plans
@pytest.mark.parametrize('quantity', ['flops', 'saved_bytes'])
def test_image_that_the_model_cant_take(resnet, snapshot, plan, quantity):
    model = resnet()
    model.stem = nn.Conv2d(3, 16, 9)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"ResNet can't (run|train) on a 1x3x4x6 image, on which .* are counted .*; "
                                         r'set another image_size=\(height, width\)'):
        replace_blocks_(model, dict(BUDGETS[quantity][1],
                                    plan=dict(type=plan.__name__, budget={quantity: 0.7}, image_size=(4, 6))))
    assert_same(snapshot(model), before)


@pytest.mark.parametrize('fusion', [dict(type='OwnWeights'), dict(type='OwnWeights', learn=False)], ids=str)
def test_blocks_with_own_weights_are_not_searched(resnet, snapshot, fusion):
    model = resnet()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^replacement.plan: LearnedPlan\(budget=dict\(params=0.7\)\) chooses what is "
                                         r"made of other blocks' weights, and OwnWeights\(.*\) makes nothing; take "
                                         'another fusion or plan$'):
        replace_blocks_(model, dict(plan=dict(type='LearnedPlan', budget=dict(params=0.7)), fusion=fusion))
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(('settings', 'match'), [
    (dict(fusion=dict(type='TransformFusion', rank=10 ** 6)), '^replacement.fusion: '),
    (dict(gradient=dict(memory='rebuild', sample=0.5)), '^replacement.gradient: '),
], ids=['fusion', 'gradient'])
def test_errors_of_other_settings_go_by_their_names(toy_net, snapshot, settings, match):
    model = toy_net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match) as error:
        replace_blocks_(model, dict(settings, plan=dict(type='LearnedPlan', budget=dict(params=0.9))))
    assert 'LearnedPlan' not in str(error.value)
    assert_same(snapshot(model), before)


# Blocks that exclude each other

class Table(nn.Module):
    """A block with a position table of some size, and a second one that not all have."""

    def __init__(self, table: int, more: int = 1) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table, self.more = nn.Parameter(torch.zeros(table)), nn.Parameter(torch.zeros(more))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other(torch.tanh(self.one(x))) + self.table.sum() + self.more.sum()


@pytest.fixture
def tables() -> Callable[[], nn.Module]:
    """Blocks 1 and 3 need each other's table, so that one of them is kept; replacing block 1 saves far more."""
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(Table(5), Table(10, 1000), Table(5), Table(10), Table(5, 1000)))
    return build


def test_tables_exclude_each_other(tables):
    chain = find_chains(tables())['0']
    assert chain.replaceable() == [1, 2, 3]
    assert chain.why_not(1, {'0': [1, 3]}) is not None


@pytest.mark.parametrize('seed', [0, 1])
def test_random_plan_keeps_the_budget_where_blocks_exclude_each_other(tables, seed):
    """Only block 1 saves enough, and block 3 must not be drawn before it."""
    model, whole = tables(), measure(tables(), 'params')
    replace_blocks_(model, dict(plan=dict(type='RandomPlan', budget=dict(params=0.6), seed=seed)))
    assert measure(model, 'params') / whole <= 0.6
