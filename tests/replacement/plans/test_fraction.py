"""Fraction: how many blocks it takes, how they are spread, and which give way."""
import pytest
import torch
from torch import nn

from rl_mmdet.replacement import find_chains, replace_blocks_
from rl_mmdet.replacement.plans import Fraction


@pytest.fixture
def net_of(toy_net):
    """Build a model of chains ``a``, ``b``, ... with as many equal blocks as given."""
    def build(*lengths):
        unit = type(toy_net().layer2[0])
        return nn.ModuleDict({name: nn.Sequential(*(unit(4, 4) for _ in range(length)))
                              for name, length in zip('abc', lengths, strict=False)})
    return build


@pytest.mark.parametrize(('p', 'layer1', 'layer2'), [
    (0.01, [], [3]), (0.2, [], [3]), (0.4, [], [2, 4]), (0.5, [1], [2, 4]), (0.8, [1], [1, 3, 4]),
    (1, [1], [1, 2, 3, 4])])
def test_takes_that_part_of_the_replaceable_blocks(toy_net, p, layer1, layer2):
    """Five blocks can be replaced, one of them in layer1."""
    assert Fraction(p).choose(find_chains(toy_net())) == {'layer1': layer1, 'layer2': layer2}


@pytest.mark.parametrize(('lengths', 'p', 'shares'), [
    ((5, 8, 5), 0.5, [2, 3, 1]),  # 3, 6 and 3 can be: 1.5, 3 and 1.5
    ((4, 6, 3), 0.3, [1, 1, 0]),  # 2, 4 and 1 can be: 0.57, 1.14 and 0.29
    ((3, 23, 3), 0.25, [0, 6, 0]),
])
def test_gives_each_chain_its_share_by_largest_remainder(net_of, lengths, p, shares):
    choice = Fraction(p).choose(find_chains(net_of(*lengths)))
    assert [len(indices) for indices in choice.values()] == shares


@pytest.mark.parametrize('length', [5, 8, 13])
def test_up_to_half_puts_no_two_side_by_side(net_of, length):
    for count in range(1, (length - 1) // 2 + 1):
        choice = Fraction(count / (length - 2)).choose(find_chains(net_of(length)))['a']
        assert len(choice) == count
        gaps = [after - before for before, after in zip(choice, choice[1:], strict=False)]
        assert all(gap >= 2 for gap in gaps)
        assert max(gaps, default=2) - min(gaps, default=2) <= 1


def test_a_block_that_would_stand_beside_another_is_moved(net_of):
    """The shapes of blocks 2 and 4 have no equal, so 1, 3, 5 and 6 can be replaced; evenly it would be 1, 5, 6."""
    net = net_of(8)
    for index in (2, 4):
        net['a'][index].extra = nn.Parameter(torch.zeros(3 + index))
    assert Fraction(0.75).choose(find_chains(net))['a'] == [1, 3, 6]


def test_a_block_that_would_make_the_choice_invalid_gives_way(net_of, toy_net):
    """Two blocks alone have a table of their size: one can take the other's place, not both."""
    net = net_of(6)
    for index in (1, 2, 4):
        net['a'][index].table = nn.Parameter(torch.zeros(7))
    assert replace_blocks_(net, dict(plan=Fraction(1))).replaced == {'a': [1, 2, 3]}
    report = replace_blocks_(toy_net(), dict(plan=Fraction(1), fusion=dict(adapt=True)))
    assert sum(row.replaced for row in report.rows) == 8  # one is left to take the tensors from


def test_frozen_stages_are_left_alone(toy_net):
    net = toy_net()
    net.layer1.requires_grad_(False)
    assert Fraction(0.5).choose(find_chains(net)) == {'layer1': [], 'layer2': [2, 4]}
    with pytest.raises(ValueError, match=r'plan: Fraction\(p=0.5\) replaces no block of this model; .*none'):
        replace_blocks_(net.requires_grad_(False), dict(plan=Fraction(0.5)))


@pytest.mark.parametrize('p', [0, 1.01])
def test_wrong_p_raises(p):
    with pytest.raises(ValueError, match='Fraction: p must be a number above 0 and at most 1, got'):
        Fraction(p)


def test_choose_returns_a_list_of_its_own(toy_net):
    plan = Fraction(0.5)
    plan.choose(find_chains(toy_net()))['layer2'].clear()
    assert plan.chosen['layer2'] == [2, 4]
