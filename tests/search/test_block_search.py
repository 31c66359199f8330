"""The search for a plan: it finds the blocks that do no harm, keeps the budget, and settles gate by gate."""
import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from rl_mmdet.replacement import computing_layers, replace_blocks_
from rl_mmdet.search import BlockSearch

HARMLESS = [2, 3, 5, 8]
"""Of the chain's blocks 0 to 9, those that are the identity and whose computing layers are that, too."""


class Mlp(nn.Module):
    """A residual unit of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other(torch.tanh(self.one(x)))


def chain_of(length: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(*(Mlp() for _ in range(length))))


@pytest.fixture
def searched() -> Callable[..., tuple[nn.Module, Tensor]]:
    """A chain that is searched, inputs, and what it makes of them with no block replaced: what it should go on making.

    Harmless blocks have output layers of 0, and their computing layers coefficients of 0. All others matter.
    """
    def build(budget: float = 0.75, **settings: Any) -> tuple[nn.Module, Tensor, Tensor]:
        model = chain_of()
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for index in HARMLESS:
                model[0][index].other.weight.zero_()
                model[0][index].other.bias.zero_()
            wanted = model(x)
        replace_blocks_(model, dict(plan=dict(type='LearnedPlan', budget=dict(params=budget), **settings)))
        with torch.no_grad():
            for index in HARMLESS:
                model[0][index].replaced.coeff.zero_()
        return model, x, wanted
    return build


def run(search: BlockSearch, x: Tensor, wanted: Tensor, steps: int | None = None) -> list[list[bool]]:
    """Search without training the weights."""
    drawn = []
    while not search.done and (steps is None or len(drawn) < steps):
        drawn.append(search.sample())
        (search.model(x) - wanted).square().mean().backward()
        search.learn()
    return drawn


@pytest.mark.parametrize('seed', [0, 1])
def test_learns_to_replace_what_does_no_harm(searched, seed):
    """Three blocks are to be replaced, of eight that may be."""
    model, x, wanted = searched(seed=seed)
    search = BlockSearch(model, 100)
    run(search, x, wanted)
    choice, left = search.decide()
    assert set(choice['0']) <= set(HARMLESS)
    assert len(choice['0']) == 3
    assert left <= 0.75
    search.finish_(choice)
    torch.testing.assert_close(model(x), wanted)


def test_learns_while_the_weights_learn(searched):
    model, x, wanted = searched(0.65)
    search, optimizer = BlockSearch(model, 100), torch.optim.SGD(model.parameters(), 1e-3)
    while not search.done:
        search.sample()
        (model(x) - wanted).square().mean().backward()
        search.learn()
        optimizer.step()
        optimizer.zero_grad()
    choice, left = search.decide()
    assert choice == {'0': HARMLESS}
    assert left <= 0.65


def test_draws_keep_the_budget_on_average(searched):
    model, x, wanted = searched(0.7)
    search = BlockSearch(model, 240)
    drawn = torch.tensor(run(search, x, wanted, 120)).double()
    saved = drawn @ torch.tensor(model.search_space.savings).double()
    assert saved.mean() == pytest.approx(0.3, abs=0.02)


def test_gates_settle_one_by_one_in_the_second_half(searched):
    model, x, wanted = searched()
    search, counts = BlockSearch(model, 16), []
    while not search.done:
        run(search, x, wanted, 1)
        counts.append(search.settled)
    assert counts == [0] * 8 + [1, 2, 3, 4, 5, 6, 7, 8]
    assert search.done


@pytest.mark.parametrize('steps', [1, 2, 3, 50])
def test_all_are_settled_at_the_end_and_keep_the_budget(searched, steps):
    model, x, wanted = searched()
    search = BlockSearch(model, steps)
    assert len(run(search, x, wanted)) == steps
    assert search.settled == 8
    assert search.done
    gates = search.policy.settled
    choice, left = search.decide()
    assert choice == model.search_space.choice(gates)
    assert left <= 0.75


def test_settled_gates_stay_and_run_one_branch_only(searched):
    model, x, wanted = searched()
    search = BlockSearch(model, 20)
    run(search, x, wanted, 15)
    settled = list(search.policy.settled)
    assert 0 < search.settled < 8
    calls: list[int] = []
    for index, block in enumerate(search.space.blocks):
        for linear in (block.one, block.replaced.one):
            linear.register_forward_hook(lambda *_, index=index: calls.append(index))
    drawn = run(search, x, wanted, 1)[0]
    assert [gate for gate, fixed in zip(drawn, settled, strict=True) if fixed is not None] == [
        fixed for fixed in settled if fixed is not None]
    assert [calls.count(index) for index in range(8)] == [1 if fixed is not None else 2 for fixed in settled]


def test_best_and_show_best(searched):
    model, x, wanted = searched()
    search = BlockSearch(model, 100)
    run(search, x, wanted, 60)
    best = search.best()
    search.show_best()
    assert [block.gate.replace for block in search.space.blocks] == best
    with torch.no_grad():
        shown = model(x)
    model(x).sum().backward()  # nobody's leaf gets a gradient
    twin = copy.deepcopy(model)
    BlockSearch(twin, 1).finish_(search.space.choice(best))
    assert torch.equal(twin(x), shown)
    run(search, x, wanted)
    assert search.done


def test_best_keeps_the_budget_at_every_step(searched):
    model, x, wanted = searched(0.7)
    search = BlockSearch(model, 20)
    while not search.done:
        assert search.measure(search.best()) <= 0.7
        run(search, x, wanted, 1)


def test_measure_is_what_is_left(searched):
    model, *_ = searched()
    search = BlockSearch(model, 10)
    whole = sum(p.numel() for p in chain_of().parameters())
    one = sum(p.numel() for p in Mlp().parameters())
    assert search.measure([False] * 8) == 1
    assert search.measure([True, False, True] + [False] * 5) == pytest.approx((whole - 2 * one + 4) / whole)
    assert search.space.open


def test_decide_and_measure_leave_the_model_searching(searched):
    model, x, wanted = searched()
    search = BlockSearch(model, 10)
    run(search, x, wanted, 5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    search.decide()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    run(search, x, wanted)
    assert search.done


def test_finish_with_copies(searched):
    model, x, wanted = searched()
    search = BlockSearch(model, 10)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    run(search, x, wanted)
    choice, _ = search.decide()
    report = search.finish_(choice, twin)
    assert report.replaced == choice
    names = [f'0.{index}' for index in choice['0']]
    assert list(computing_layers(model)) == list(computing_layers(twin)) == names
    assert list(model.state_dict()) == list(twin.state_dict())
    assert not hasattr(model, 'search_space') and not hasattr(twin, 'search_space')


def test_conclude_gives_the_ordinary_setting(searched):
    model, x, wanted = searched(0.65)
    search = BlockSearch(model, 100)
    run(search, x, wanted)
    for block in search.space.blocks:
        block.replaced.norm_stale = False
    found = search.conclude_()
    assert found.setting == dict(plan=dict(type='Blocks', blocks={'0': HARMLESS}))
    assert found.text.startswith('LearnedPlan(budget=dict(params=0.65)): 0.6')
    assert 'of the learnable parameters are left' in found.text
    assert all(layer.norm_stale for layer in computing_layers(model).values())
    assert model.replacement_report.replaced == {'0': HARMLESS}


@pytest.mark.parametrize('at', [3, 25, 36])
def test_resumed_it_makes_the_same_choice(searched, at):
    model, x, wanted = searched()
    search = BlockSearch(model, 40)
    run(search, x, wanted, at)
    file = io.BytesIO()
    torch.save(dict(search=search.state_dict(), model=model.state_dict()), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other, *_ = searched()
    resumed = BlockSearch(other, 40)
    other.load_state_dict(state['model'])
    resumed.load_state_dict(state['search'])
    assert run(resumed, x, wanted) == run(search, x, wanted)
    assert resumed.policy.settled == search.policy.settled
    assert resumed.decide() == search.decide()


def test_gradients_are_reduced_and_scores_shared(searched):
    model, x, wanted = searched()
    search, plain = BlockSearch(model, 40), BlockSearch(copy.deepcopy(model), 40)
    for each, reduce in ((search, lambda gradient: gradient.zero_()), (plain, None)):
        each.sample()
        (each.model(x) - wanted).square().mean().backward()
        each.learn(reduce, lambda scores: scores.add_(1))
    assert torch.equal(search.policy.scores, torch.ones(8).double())
    assert not torch.equal(plain.policy.scores, torch.ones(8).double())


# Blocks that cost more, and blocks that exclude each other

class Narrow(nn.Module):
    """A block of few parameters: its computing layer has more."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, channels, bias=False), nn.Linear(channels, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other(torch.tanh(self.one(x)))


def test_blocks_that_save_nothing_are_never_replaced():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*(Narrow(1) for _ in range(4))), nn.Sequential(*(Mlp8() for _ in range(5))))
    replace_blocks_(model, dict(plan=dict(type='LearnedPlan', budget=dict(params=0.6)),
                                fusion=dict(type='ChannelFusion')))
    space, x = model.search_space, torch.randn(8, 4)
    worse = [saving <= 0 for saving in space.savings]
    assert worse == [True] * 2 + [False] * 3
    search = BlockSearch(model, 12)
    drawn = run(search, x, torch.zeros(8, 4))
    assert not any(any(gates[:2]) for gates in drawn)
    choice, left = search.decide()
    assert not choice['0'] and choice['1']
    assert left <= 0.6


class Mlp8(Narrow):
    def __init__(self) -> None:
        super().__init__(64)


class Table(Mlp):
    """A block with a position table of some size, and a second one that not all have."""

    def __init__(self, table: int, more: int = 1) -> None:
        super().__init__()
        self.table, self.more = nn.Parameter(torch.zeros(table)), nn.Parameter(torch.zeros(more))


def tables(budget: float, *sizes: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*(Table(*size) for size in sizes)))
    replace_blocks_(model, dict(plan=dict(type='LearnedPlan', budget=dict(params=budget))))
    return model


EXCLUDING = ((5,), (10,), (5,), (10,), (5,), (5,))
"""Blocks 1 and 3 need each other's table."""


def test_blocks_that_exclude_each_other_give_way():
    search = BlockSearch(tables(0.7, *EXCLUDING), 60)
    drawn = []
    while not search.done:
        drawn.append(search.sample())
        search.learn()
    assert not any(gates[0] and gates[2] for gates in drawn)
    assert any(gates[0] for gates in drawn[:30]) and any(gates[2] for gates in drawn[:30])
    choice, left = search.decide()
    assert search.space.fits(search.best())
    assert not {1, 3} <= set(choice['0'])
    assert left <= 0.7


def test_blocks_that_exclude_each_other_run():
    model = tables(0.7, *EXCLUDING)
    model.search_space.set_gates([False, False, True, False], [torch.zeros((), requires_grad=True) for _ in range(4)])
    model(torch.randn(8, 8)).sum().backward()


def test_the_budget_is_kept_where_the_less_harmful_block_excludes_the_one_that_it_needs():
    """Only block 1 saves enough, and block 3, which excludes it, seems to do no harm."""
    model = tables(0.65, (5,), (10, 1000), (5,), (10,), (5, 1000))
    search = BlockSearch(model, 60)
    while not search.done:
        search.sample()
        search.leaves[0].grad = torch.tensor(1.)
        search.leaves[2].grad = torch.tensor(-1.)
        search.learn()
    assert search.decide()[1] <= 0.65


@pytest.mark.parametrize('fold_norm', [False, True])
def test_budget_of_saved_bytes_with_folded_norms(fold_norm):
    torch.manual_seed(0)
    plan = dict(type='LearnedPlan', budget=dict(saved_bytes=0.88), image_size=(64, 64))
    model = MODELS.build(dict(type='RLResNet', depth=50, base_channels=16, norm_eval=True, fold_norm=fold_norm,
                              replacement=dict(plan=plan, gradient=dict(sample=0.125))))
    search = BlockSearch(model, 1)
    search.sample()
    search.learn()
    assert search.decide()[1] <= 0.88
