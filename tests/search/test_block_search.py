"""The search for a plan: it finds the blocks that do no harm, keeps the budget, and ends in the ordinary model."""
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.replacement import computing_layers, replace_blocks_
from rl_mmdet.search import BlockSearch
from rl_mmdet.search.search_space import finish_search_

HARMLESS = [2, 3, 5, 8]
"""Of the chain's blocks 0 to 9, those that are the identity and whose computing layers are that, too."""


class Mlp(nn.Module):
    """A residual unit of two linear layers, which may have a position table of some size, and a second one."""

    def __init__(self, table: int = 0, more: int = 1, hidden: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, hidden, bias), nn.Linear(hidden, 8, bias)
        if table:
            self.table, self.more = nn.Parameter(torch.zeros(table)), nn.Parameter(torch.zeros(more))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other(torch.tanh(self.one(x)))


Built = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture
def searched() -> Callable[..., Built]:
    """A chain that is searched, inputs, and what it makes of them with no block replaced: what it should go on making.

    Harmless blocks have output layers of 0, and their computing layers coefficients of 0. All others matter.
    """
    def build(budget: float = 0.75, **settings: Any) -> Built:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(*(Mlp() for _ in range(10))))
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


def run(search: BlockSearch, x: Tensor, wanted: Tensor, steps: int | None = None,
        optimizer: torch.optim.Optimizer | None = None) -> list[list[bool]]:
    """Search; without an optimizer the weights don't learn."""
    drawn = []
    while not search.done and (steps is None or len(drawn) < steps):
        drawn.append(search.sample())
        (search.model(x) - wanted).square().mean().backward()
        search.learn()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return drawn


@pytest.mark.parametrize(('budget', 'learn'), [(0.75, False), (0.65, True)])
def test_learns_to_replace_what_does_no_harm(searched, budget, learn):
    """Three or four blocks are to be replaced, of eight that may be; with weights that learn meanwhile, or don't."""
    model, x, wanted = searched(budget)
    search = BlockSearch(model, 60)
    run(search, x, wanted, optimizer=torch.optim.SGD(model.parameters(), 1e-3) if learn else None)
    found, text = search.conclude_()
    blocks = found['plan']['blocks']['0']
    assert found == dict(plan=dict(type='Blocks', blocks={'0': blocks})) and set(blocks) <= set(HARMLESS)
    assert len(blocks) == (4 if learn else 3)
    assert text.startswith(f'LearnedPlan(budget=dict(params={budget})): 0.')
    assert 'of the learnable parameters are left' in text
    assert model.replacement_report.replaced == {'0': blocks}
    if not learn:
        torch.testing.assert_close(model(x), wanted)


def test_draws_keep_the_budget_on_average(searched):
    model, x, wanted = searched(0.7)
    drawn = torch.tensor(run(BlockSearch(model, 160), x, wanted, 80)).double()
    saved = drawn @ torch.tensor(model.search_space.savings).double()
    assert saved.mean() == pytest.approx(0.3, abs=0.03)


def test_validation_shows_the_best_choice_which_keeps_the_budget_at_every_step(searched):
    model, x, wanted = searched(0.7)
    search = BlockSearch(model, 12)
    while not search.done:
        run(search, x, wanted, 1)
        search.show_best()
        shown, twin = model(x), copy.deepcopy(model)
        choice, left = search.decide()
        assert left <= 0.7
        finish_search_(twin, choice)
        assert torch.equal(twin(x), shown)
        shown.sum().backward()  # nobody's gate gets a gradient


def test_conclude_with_copies(searched):
    model, x, wanted = searched()
    search, twin = BlockSearch(model, 10), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    run(search, x, wanted)
    assert search.decide() == search.decide()  # which leaves the model searching
    for block in search.space.blocks:
        block.replaced.norm_stale = False
    blocks = search.conclude_(twin).found['plan']['blocks']['0']
    assert list(computing_layers(model)) == list(computing_layers(twin)) == [f'0.{index}' for index in blocks]
    assert all(layer.norm_stale for layer in computing_layers(model).values())
    own = model.state_dict()
    assert all(torch.allclose(value, 0.9 * own[key]) for key, value in twin.state_dict().items())
    assert not hasattr(model, 'search_space') and not hasattr(twin, 'search_space')


# Blocks that cost more, and blocks that exclude each other

def test_blocks_that_save_nothing_are_not_open():
    model = nn.Sequential(nn.Sequential(*(Mlp(hidden=1, bias=False) for _ in range(4))),
                          nn.Sequential(*(Mlp(hidden=64) for _ in range(5))))
    report = replace_blocks_(model, dict(plan=dict(type='LearnedPlan', budget=dict(params=0.6)),
                                         fusion=dict(type='TransformFusion', rank=1)))
    assert [row.name for row in report.rows if row.open] == ['1.1', '1.2', '1.3']
    assert "  0.1 (Mlp): kept, can't be replaced: that would save no learnable parameters" in str(report)


def tables(budget: float, *sizes: tuple[int, ...]) -> nn.Module:
    """Blocks with tables of these sizes; those that alone have one of a size need each other's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*(Mlp(*size) for size in sizes)))
    replace_blocks_(model, dict(plan=dict(type='LearnedPlan', budget=dict(params=budget))))
    return model


def test_blocks_that_exclude_each_other_give_way():
    """Blocks 1 and 3."""
    model, drawn = tables(0.7, (5,), (10,), (5,), (10,), (5,), (5,)), []
    search = BlockSearch(model, 60)
    while not search.done:
        drawn.append(search.sample())
        model(torch.randn(2, 8)).sum().backward()
        search.learn()
    assert not any(gates[0] and gates[2] for gates in drawn)
    assert any(gates[0] for gates in drawn[:30]) and any(gates[2] for gates in drawn[:30])
    choice, left = search.decide()
    assert not {1, 3} <= set(choice['0'])
    assert left <= 0.7


def test_the_budget_is_kept_where_the_less_harmful_block_excludes_the_one_that_it_needs():
    """Only block 1 saves enough, and block 3, which excludes it, seems to do no harm."""
    search = BlockSearch(tables(0.65, (5,), (10, 1000), (5,), (10,), (5, 1000)), 60)
    while not search.done:
        search.sample()
        search.leaves[0].grad = torch.tensor(1.)
        search.leaves[2].grad = torch.tensor(-1.)
        search.learn()
    assert search.decide()[1] <= 0.65
