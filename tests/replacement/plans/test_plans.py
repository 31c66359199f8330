"""Plans: where. What is chosen, and how wrong settings are refused."""
import pytest
import torch
from torch import nn

from rl_mmdet.replacement import find_chains, replace_blocks_
from rl_mmdet.replacement.chain import describe_replaceable
from rl_mmdet.replacement.plans import Blocks, EveryKth, Fraction


@pytest.fixture
def net_of(toy_net):
    """Build a model of chains ``a``, ``b``, ... with as many equal blocks as given."""
    def build(*lengths):
        unit = type(toy_net().layer2[0])
        return nn.ModuleDict({name: nn.Sequential(*(unit(4, 4) for _ in range(length)))
                              for name, length in zip('abc', lengths, strict=False)})
    return build


@pytest.mark.parametrize(('k', 'offset', 'layer1', 'layer2'), [
    (2, 1, [1], [1, 3]),
    (2, 0, [], [2, 4]),
    (3, 1, [1], [1, 4]),
    (4, 1, [1], [1]),
    (4, 3, [], [3]),
    (100, 1, [1], [1]),
])
def test_every_kth_takes_index_modulo_k_equal_offset(toy_net, k, offset, layer1, layer2):
    assert EveryKth(k, offset).choose(find_chains(toy_net())) == {'layer1': layer1, 'layer2': layer2}


def test_every_kth_default_offset_is_one():
    assert EveryKth(k=3).offset == 1


def test_every_kth_frozen_stage_is_left_alone(toy_net):
    net = toy_net()
    net.layer1.requires_grad_(False)
    assert EveryKth(2).choose(find_chains(net)) == {'layer1': [], 'layer2': [1, 3]}


@pytest.mark.parametrize('k', [1, 0, -2, 2.0, '2', True, None])
def test_every_kth_wrong_k_raises(k):
    with pytest.raises(ValueError, match=r'k must be an integer of at least 2, got'):
        EveryKth(k)


@pytest.mark.parametrize('offset', [-1, 3, 4, 1.0, '1', True, None])
def test_every_kth_wrong_offset_raises(offset):
    with pytest.raises(ValueError, match=r'offset must be an integer from 0 to k - 1 = 2, got'):
        EveryKth(3, offset)


def test_blocks_takes_exactly_the_named(toy_net):
    assert Blocks({'layer2': [3, 1]}).choose(find_chains(toy_net())) == {'layer1': [], 'layer2': [1, 3]}


def test_blocks_unknown_stage_names_the_blocks_that_can_be_replaced(toy_net):
    can = r'blocks that can be replaced: layer1: \[1\], layer2: \[1, 2, 3, 4\]'
    with pytest.raises(ValueError, match=f"no stage 'layer9'; {can}"):
        Blocks({'layer9': [1]}).choose(find_chains(toy_net()))


@pytest.mark.parametrize('index', [6, -1])
def test_blocks_index_out_of_range_names_the_range(toy_net, index):
    match = rf'layer2 has no block {index}, its blocks are 0 to 5; .*layer1: \[1\]'
    with pytest.raises(ValueError, match=match):
        Blocks({'layer2': [index]}).choose(find_chains(toy_net()))


@pytest.mark.parametrize('blocks', [None, 3, 'layer1', [1, 2]])
def test_blocks_not_a_dict_raises(blocks):
    with pytest.raises(TypeError, match=r"blocks must be a dict such as \{'layer3': \[1, 3\]\}, got"):
        Blocks(blocks)


@pytest.mark.parametrize('indices', [1, '1', [1.0], [True], None, {1}])
def test_blocks_not_a_list_of_indices_raises(indices):
    with pytest.raises(TypeError, match="'layer1' must map to a list of block indices, got"):
        Blocks({'layer1': indices})


def test_blocks_named_twice_raises():
    with pytest.raises(ValueError, match=r"'layer1' names a block twice: \[1, 1\]"):
        Blocks({'layer1': [1, 1]})


@pytest.mark.parametrize('blocks', [{}, {'layer1': []}])
def test_blocks_nothing_named_raises(blocks):
    with pytest.raises(ValueError, match='no block is named'):
        Blocks(blocks)


def test_describe_replaceable_no_block_says_none(toy_net):
    assert describe_replaceable(find_chains(toy_net().requires_grad_(False))).endswith(': none')


@pytest.mark.parametrize(('p', 'layer1', 'layer2'), [
    (0.01, [], [3]),
    (0.2, [], [3]),
    (0.4, [], [2, 4]),
    (0.5, [1], [2, 4]),
    (0.8, [1], [1, 3, 4]),
    (1, [1], [1, 2, 3, 4]),
])
def test_fraction_takes_that_part_of_the_replaceable_blocks(toy_net, p, layer1, layer2):
    """Five blocks can be replaced, one of them in layer1."""
    assert Fraction(p).choose(find_chains(toy_net())) == {'layer1': layer1, 'layer2': layer2}


@pytest.mark.parametrize(('lengths', 'p', 'shares'), [
    ((5, 8, 5), 0.5, [2, 3, 1]),  # 3, 6 and 3 can be: 1.5, 3 and 1.5
    ((4, 6, 3), 0.3, [1, 1, 0]),  # 2, 4 and 1 can be: 0.57, 1.14 and 0.29
    ((3, 23, 3), 0.25, [0, 6, 0]),
])
def test_fraction_gives_each_chain_its_share_by_largest_remainder(net_of, lengths, p, shares):
    choice = Fraction(p).choose(find_chains(net_of(*lengths)))
    assert [len(indices) for indices in choice.values()] == shares


@pytest.mark.parametrize('length', [4, 5, 8, 13, 23])
def test_fraction_up_to_half_puts_no_two_side_by_side(net_of, length):
    for count in range(1, (length - 1) // 2 + 1):
        choice = Fraction(count / (length - 2)).choose(find_chains(net_of(length)))['a']
        assert len(choice) == count
        gaps = [after - before for before, after in zip(choice, choice[1:], strict=False)]
        assert all(gap >= 2 for gap in gaps)
        assert max(gaps, default=2) - min(gaps, default=2) <= 1


def test_fraction_moves_a_block_that_would_stand_beside_another(net_of):
    """The shapes of blocks 2 and 4 have no equal, so 1, 3, 5 and 6 can be replaced; evenly it would be 1, 5, 6."""
    net = net_of(8)
    for index in (2, 4):
        net['a'][index].extra = nn.Parameter(torch.zeros(3 + index))
    assert find_chains(net)['a'].replaceable() == [1, 3, 5, 6]
    assert Fraction(0.75).choose(find_chains(net))['a'] == [1, 3, 6]


def test_fraction_block_that_would_make_the_choice_invalid_gives_way(net_of):
    """Two blocks alone have a table of their size: one can take the other's place, not both."""
    net = net_of(6)
    for index in (1, 2, 4):
        net['a'][index].table = nn.Parameter(torch.zeros(7))
    choice = Fraction(1).choose(find_chains(net))
    assert choice['a'] == [1, 2, 3]
    replace_blocks_(net, dict(plan=Fraction(1)))


def test_fraction_with_adapted_tensors_keeps_a_block_to_take_them_from(toy_net):
    net = toy_net()
    report = replace_blocks_(net, dict(plan=Fraction(1), fusion=dict(adapt=True)))
    assert sum(row.replaced for row in report.rows) == 8


def test_fraction_frozen_stage_is_left_alone(toy_net):
    net = toy_net()
    net.layer1.requires_grad_(False)
    assert Fraction(0.5).choose(find_chains(net)) == {'layer1': [], 'layer2': [2, 4]}


def test_fraction_nothing_to_replace_raises(toy_net):
    with pytest.raises(ValueError, match=r'plan: Fraction\(p=0.5\) replaces no block of this model; .*none'):
        replace_blocks_(toy_net().requires_grad_(False), dict(plan=Fraction(0.5)))


@pytest.mark.parametrize('p', [0, -0.1, 1.01, 2, float('nan'), '0.5', True, None])
def test_fraction_wrong_p_raises(p):
    with pytest.raises(ValueError, match='Fraction: p must be a number above 0 and at most 1, got'):
        Fraction(p)


def test_repr_before_a_choice_has_the_settings():
    assert (repr(EveryKth(3)), repr(Fraction(0.5))) == ('EveryKth(k=3, offset=1)', 'Fraction(p=0.5)')


@pytest.mark.parametrize('plan', [EveryKth(2), Fraction(0.5)])
def test_repr_after_a_choice_has_it_as_blocks(toy_net, plan):
    report = replace_blocks_(toy_net(), dict(plan=plan))
    pasted = eval(repr(plan).partition(': ')[2])
    assert replace_blocks_(toy_net(), dict(plan=pasted)).replaced == report.replaced
    assert report.settings['plan'] == repr(plan)


def test_choose_returns_a_list_of_its_own(toy_net):
    plan = Fraction(0.5)
    plan.choose(find_chains(toy_net()))['layer2'].clear()
    assert plan.chosen['layer2'] == [2, 4]
