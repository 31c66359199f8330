"""LearnedPlan: what it accepts, what its budgets mean, and which choices keep them."""
import re
from collections.abc import Callable

import pytest
import torch
from mmdet.models.backbones.resnet import Bottleneck
from torch import Tensor, nn

from rl_mmdet.replacement import replace_blocks_
from rl_mmdet.replacement.plans import Blocks
from rl_mmdet.search import BlockSearch, LearnedPlan
from rl_mmdet.search.search_space import finish_search_

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

BUDGET = 'budget must be a dict such as dict(params=0.7), got '


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(budget=0.7), BUDGET + '0.7'),
    (dict(budget={}), BUDGET + '{}'),
    (dict(budget=dict(flops=0.5)), BUDGET + "{'flops': 0.5}"),
    *((dict(budget=dict(params=share)), 'budget.params must be a number above 0 and below 1, got '
       f"{share!r} (a share of the unreplaced model's learnable parameters)") for share in (0, 1, '0.5', float('nan'))),
    *((dict(seed=seed), f'seed must be an integer of at least 0 and below {2**63}, got {seed!r}')
      for seed in (-1, 1.5, None, 2**63)),
    (dict(epochs=1, iters=5), 'epochs=1 and iters=5 both say how long the search is; leave one out'),
    (dict(epochs=0), 'epochs must be an integer of at least 1, got 0'),
    (dict(iters=1.5), 'iters must be an integer of at least 1, got 1.5'),
], ids=str)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f'^LearnedPlan: {re.escape(message)}$'):
        LearnedPlan(**(dict(budget=dict(params=0.7)) | arguments))


def test_plans_show_their_settings():
    assert repr(LearnedPlan(dict(params=0.7))) == 'LearnedPlan(budget=dict(params=0.7))'
    assert repr(LearnedPlan(dict(params=0.7), iters=9)) == 'LearnedPlan(budget=dict(params=0.7), iters=9)'


# Budgets

def share_of(model: nn.Module, baseline: nn.Module) -> float:
    whole, left = (sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (baseline, model))
    return left / whole


def test_a_search_measures_savings_and_ends_with_the_budget_kept(resnet):
    model, baseline = resnet(), resnet()
    replace_blocks_(model.train(), dict(plan=dict(type='LearnedPlan', budget=dict(params=0.65))))
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in baseline.state_dict().items())
    assert all(module.training for module in model.modules())
    space = model.search_space
    for place, saving in list(zip(space.places, space.savings, strict=True))[::2]:
        alone = resnet()
        replace_blocks_(alone, dict(plan=Blocks({place.chain.name: [place.index]})))
        assert saving == pytest.approx(1 - share_of(alone, baseline))
    search = BlockSearch(model, 2)
    while not search.done:
        search.sample()
        model(torch.randn(1, 3, 32, 32)).square().sum().backward()
        search.learn()
    choice, left = search.decide()
    finish_search_(model, choice)
    assert left <= 0.65
    assert left == pytest.approx(share_of(model, baseline))


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


def test_budget_that_cant_be_reached(resnet, refused):
    said = refused(resnet(), dict(plan=dict(type='LearnedPlan', budget=dict(params=0.1))))
    assert re.fullmatch(r"replacement.plan: LearnedPlan\(.*\): the budget can't be reached: with 5 blocks replaced, "
                        r"all that save something, \d\.\d{3} of the unreplaced model's learnable parameters are left",
                        said)


def test_models_with_nothing_to_replace(resnet, refused):
    settings = dict(plan=dict(type='LearnedPlan', budget=dict(params=0.7)))
    said = refused(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), settings)
    assert said.startswith('replacement.plan: the model has no chain of blocks')
    model = resnet()
    model.layer1, model.layer2 = model.layer1[:2], model.layer2[:2]
    assert re.match(r'replacement.plan: LearnedPlan\(.*\) replaces no block of this model; blocks that can be '
                    r'replaced: none \(no kept block', refused(model, settings))


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
