"""LearnedPlan and RandomPlan: what they accept, what their budgets mean, and which choices keep them."""
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.models.backbones.resnet import Bottleneck
from torch import Tensor, nn

from rl_mmdet.replacement import computing_layers, find_chains, replace_blocks_, set_step_
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

BUDGET = 'budget must be a dict with one of params, flops, saved_bytes, such as dict(params=0.7), got '


@plans
@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(budget=0.7), BUDGET + '0.7'),
    (dict(budget={}), BUDGET + '{}'),
    (dict(budget=dict(memory=0.5)), BUDGET + "{'memory': 0.5}"),
    (dict(budget=dict(params=0.5, flops=0.5)), BUDGET + "{'params': 0.5, 'flops': 0.5}"),
    *((dict(budget=dict(flops=share)), 'budget.flops must be a number above 0 and below 1, got '
       f"{share!r} (a share of the unreplaced model's forward FLOPs)") for share in (0, 1, '0.5', True, float('nan'))),
    *((dict(image_size=size), f'image_size must be (height, width) in pixels, two positive integers, got {size!r}')
      for size in (64, (64,), (64, 0), (64, 64.), '64')),
    *((dict(seed=seed), f'seed must be an integer of at least 0 and below {2**63}, got {seed!r}')
      for seed in (-1, 1.5, None, 2**63)),
], ids=str)
def test_wrong_arguments_are_refused(plan, arguments, message):
    with pytest.raises(ValueError, match=f'^{plan.__name__}: {re.escape(message)}$'):
        plan(**(dict(budget=dict(params=0.7)) | arguments))


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(epochs=1, iters=5), 'epochs=1 and iters=5 both say how long the search is; leave one out'),
    (dict(epochs=0), 'epochs must be an integer of at least 1, got 0'),
    (dict(iters=1.5), 'iters must be an integer of at least 1, got 1.5'),
    *((dict(temperature=t), f'temperature must be two numbers above 0, got {t!r}') for t in (1., (1.,), '12')),
    (dict(temperature=(1., 0)), 'temperature must be a number at least 0.001, got 0'),
    (dict(lr=0), 'lr must be a number above 0 and at most 100, got 0'),
], ids=str)
def test_a_wrong_schedule_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f'^LearnedPlan: {re.escape(message)}$'):
        LearnedPlan(dict(params=0.5), **arguments)


def test_plans_show_their_settings():
    assert repr(LearnedPlan(dict(params=0.7))) == 'LearnedPlan(budget=dict(params=0.7))'
    assert repr(LearnedPlan(dict(flops=0.7), iters=9)) == 'LearnedPlan(budget=dict(flops=0.7), iters=9)'
    assert repr(RandomPlan(dict(flops=0.7), 3)) == 'RandomPlan(budget=dict(flops=0.7), seed=3)'


def test_random_plan_needs_the_model(resnet):
    with pytest.raises(ValueError, match='^RandomPlan: it measures the model, so it needs one'):
        RandomPlan(dict(params=0.7)).choose(find_chains(resnet()))


# Budgets

SLIM = dict(operator=dict(type='SlimBlock'))
BUDGETS = {'params': (0.65, {}), 'flops': (0.65, SLIM), 'saved_bytes': (0.75, SLIM)}
budgets = pytest.mark.parametrize('quantity', BUDGETS)


def measure(model: nn.Module, quantity: str) -> float:
    """The quantity of a model, counted here."""
    if quantity == 'flops':
        return forward_flops(model.eval(), SIZE)
    if quantity == 'saved_bytes':
        set_step_(model.train(), 0)
        return saved_bytes(model, lambda: model(torch.zeros(1, 3, *SIZE)))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def share_of(model: nn.Module, baseline: nn.Module, quantity: str) -> float:
    return measure(model, quantity) / measure(baseline, quantity)


def replacement(plan: str, quantity: str, **more: Any) -> dict[str, Any]:
    share, settings = BUDGETS[quantity]
    return dict(settings, plan=dict(type=plan, budget={quantity: share}, image_size=SIZE, **more))


@budgets
def test_a_search_measures_savings_and_ends_with_the_budget_kept(resnet, quantity):
    model, baseline, (limit, settings) = resnet(), resnet(), BUDGETS[quantity]
    replace_blocks_(model.train(), replacement('LearnedPlan', quantity))
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in baseline.state_dict().items())
    assert all(module.training for module in model.modules())
    space = model.search_space
    for place, saving in list(zip(space.places, space.savings, strict=True))[::2]:
        alone = resnet()
        replace_blocks_(alone, dict(settings, plan=Blocks({place.chain.name: [place.index]})))
        assert saving == pytest.approx(1 - share_of(alone, baseline, quantity))
    search = BlockSearch(model, 2)
    while not search.done:
        search.sample()
        model(torch.randn(1, 3, *SIZE)).square().sum().backward()
        search.learn()
    choice, left = search.decide()
    finish_search_(model, choice)
    assert left <= limit
    assert left == pytest.approx(share_of(model, baseline, quantity))


@budgets
def test_random_plan_keeps_the_budget_with_no_block_too_many(resnet, quantity):
    model, baseline, (limit, settings) = resnet(), resnet(), BUDGETS[quantity]
    report = replace_blocks_(model, replacement('RandomPlan', quantity))
    assert f'the same choice as a plan: {report.as_plan}' in str(report)
    assert share_of(model, baseline, quantity) <= limit
    for name in computing_layers(model):
        chain, index = name.split('.')
        fewer = {key: [i for i in blocks if (key, i) != (chain, int(index))] for key, blocks in report.replaced.items()}
        if any(fewer.values()):
            less = resnet()
            replace_blocks_(less, dict(settings, plan=Blocks(fewer)))
            assert share_of(less, baseline, quantity) > limit


def test_random_plan_depends_on_its_seed(resnet):
    one, same, other = (str(replace_blocks_(resnet(), replacement('RandomPlan', 'params', seed=seed)).replaced)
                        for seed in (0, 0, 3))
    assert one == same != other


# What can't be

@pytest.fixture
def refused(snapshot) -> Callable[..., str]:
    """The complaint about a replacement; the model is as it was."""
    def refuse(model: nn.Module, settings: dict) -> str:
        modules, tensors, *rest = snapshot(model)
        with pytest.raises(ValueError) as caught:
            replace_blocks_(model, settings)
        now, values, *others = snapshot(model)
        assert (now, others) == (modules, rest)
        assert all(torch.equal(value, values[key]) for key, value in tensors.items())
        return str(caught.value)
    return refuse


LEFT = r" blocks replaced, all that save something, \d\.\d{3} of the unreplaced model's "


@plans
@pytest.mark.parametrize(('budget', 'settings', 'message'), [
    (dict(params=0.1), {}, f'with 5{LEFT}learnable parameters are left'),
    (dict(flops=0.9), {}, rf'with \d{LEFT}forward FLOPs are left; FullBlock computes all that the removed block did: '
                          'take a light operator'),
    (dict(flops=0.05), SLIM, f'with 5{LEFT}forward FLOPs are left'),
    (dict(saved_bytes=0.5), {}, rf'with \d{LEFT}bytes saved for backward are left; the weights that are made are kept, '
                                r'too: set gradient=dict\(recompute=True\), or a light operator'),
], ids=['params', 'flops of FullBlock', 'flops', 'saved_bytes of FullBlock'])
def test_budget_that_cant_be_reached(resnet, refused, plan, budget, settings, message):
    said = refused(resnet(), dict(settings, plan=dict(type=plan.__name__, budget=budget, image_size=SIZE)))
    given = re.escape(repr(plan(budget)))
    assert re.fullmatch(f"replacement.plan: {given}: the budget can't be reached: {message}", said)


@plans
def test_models_with_nothing_to_replace_or_another_image(resnet, refused, plan):
    settings = dict(plan=dict(type=plan.__name__, budget=dict(params=0.7)))
    said = refused(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), settings)
    assert said.startswith('replacement.plan: the model has no chain of blocks')
    model = resnet()
    model.layer1, model.layer2 = model.layer1[:2], model.layer2[:2]
    assert re.match(rf'replacement.plan: {plan.__name__}\(.*\) replaces no block of this model; blocks that can be '
                    r'replaced: none \(no kept block', refused(model, settings))
    for quantity in ('flops', 'saved_bytes'):
        model = resnet()
        model.stem = nn.Conv2d(3, 16, 9)
        plan_ = dict(type=plan.__name__, budget={quantity: 0.7}, image_size=(4, 6))
        assert re.search(r"ResNet can't (run|train) on a 1x3x4x6 image, on which .* are counted .*; set another "
                         r'image_size=\(height, width\)', refused(model, dict(SLIM, plan=plan_)))


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(fusion=dict(type='OwnWeights')),
     r"replacement.plan: LearnedPlan\(budget=dict\(params=0.7\)\) chooses what is made of other blocks' weights, and "
     r'OwnWeights\(.*\) makes nothing; take another fusion or plan'),
    (dict(fusion=dict(type='TransformFusion', rank=10 ** 6)), r'replacement\.fusion: (?!.*LearnedPlan).*'),
    (dict(gradient=dict(sample=0.5)), r'replacement\.gradient: (?!.*LearnedPlan).*'),
], ids=['own weights', 'fusion', 'gradient'])
def test_other_settings_that_dont_fit_go_by_their_names(resnet, refused, settings, message):
    assert re.fullmatch(message, refused(resnet(), dict(
        settings, plan=dict(type='LearnedPlan', budget=dict(params=0.7)))))


# Blocks that exclude each other

class Table(nn.Module):
    """A block with a position table of some size, and a second one that not all have."""

    def __init__(self, table: int, more: int = 1) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table, self.more = nn.Parameter(torch.zeros(table)), nn.Parameter(torch.zeros(more))


@pytest.mark.parametrize('seed', [0, 1])
def test_random_plan_keeps_the_budget_where_blocks_exclude_each_other(seed):
    """Blocks 1 and 3 need each other's table. Only block 1 saves enough, and block 3 must not be drawn before it."""
    def build() -> nn.Module:
        return nn.Sequential(nn.Sequential(Table(5), Table(10, 1000), Table(5), Table(10), Table(5, 1000)))

    model, chain = build(), find_chains(build())['0']
    assert chain.replaceable() == [1, 2, 3] and chain.why_not(1, {'0': [1, 3]})
    replace_blocks_(model, dict(plan=dict(type='RandomPlan', budget=dict(params=0.6), seed=seed)))
    assert share_of(model, build(), 'params') <= 0.6
