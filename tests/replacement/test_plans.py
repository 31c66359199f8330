"""Plans: where. What is chosen, and how wrong settings are refused."""
import pytest

from rl_mmdet.replacement import Blocks, EveryKth, find_chains
from rl_mmdet.replacement.plans import describe_replaceable


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
