"""Blocks: exactly the named ones, and how wrong names are refused."""
import pytest

from rl_mmdet.replacement import find_chains
from rl_mmdet.replacement.plans import Blocks


def test_takes_exactly_the_named(toy_net):
    assert Blocks({'layer2': [3, 1]}).choose(find_chains(toy_net())) == {'layer1': [], 'layer2': [1, 3]}


@pytest.mark.parametrize(('blocks', 'said'), [
    ({'layer9': [1]}, "no stage 'layer9'"),
    ({'layer2': [6]}, 'layer2 has no block 6, its blocks are 0 to 5'),
    ({'layer2': [-1]}, 'layer2 has no block -1, its blocks are 0 to 5'),
])
def test_what_isnt_there_is_named_with_the_blocks_that_can_be_replaced(toy_net, blocks, said):
    can = r'blocks that can be replaced: layer1: \[1\], layer2: \[1, 2, 3, 4\]'
    with pytest.raises(ValueError, match=f'{said}; {can}'):
        Blocks(blocks).choose(find_chains(toy_net()))


@pytest.mark.parametrize(('blocks', 'error', 'message'), [
    (None, TypeError, r"blocks must be a dict such as \{'layer3': \[1, 3\]\}, got None"),
    ([1, 2], TypeError, r"blocks must be a dict such as \{'layer3': \[1, 3\]\}, got \[1, 2\]"),
    *(({'layer1': wrong}, TypeError, "'layer1' must map to a list of block indices, got")
      for wrong in ('1', [1.0], [True])),
    ({'layer1': [1, 1]}, ValueError, r"'layer1' names a block twice: \[1, 1\]"),
    ({}, ValueError, 'no block is named'),
    ({'layer1': []}, ValueError, 'no block is named'),
])
def test_wrong_blocks_raise(blocks, error, message):
    with pytest.raises(error, match=f'Blocks: .*{message}' if error is ValueError else message):
        Blocks(blocks)
