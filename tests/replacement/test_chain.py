"""Chains: where they are found, who the neighbours are, who can't be replaced."""
import pytest
import torch
from torch import nn

from rl_mmdet.replacement import find_chains
from rl_mmdet.replacement.chain import Chain, Place


def test_find_chains_two_stages(toy_net):
    chains = find_chains(toy_net())
    assert {name: len(chain) for name, chain in chains.items()} == {'layer1': 3, 'layer2': 6}


def test_find_chains_nested_in_a_wrapper_has_qualified_names(toy_net):
    assert list(find_chains(nn.ModuleDict({'backbone': toy_net()}))) == ['backbone.layer1', 'backbone.layer2']


def test_find_chains_module_list_is_a_chain():
    blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 4) for _ in range(3))
    assert list(find_chains(nn.ModuleDict({'blocks': blocks}))) == ['blocks']


def test_find_chains_model_that_is_itself_a_chain():
    chain = find_chains(nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, 4) for _ in range(3))))['']
    assert len(chain) == 3


def test_find_chains_single_convolutions_are_no_blocks():
    laterals = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
    assert find_chains(nn.ModuleDict({'laterals': laterals})) == {}


def test_find_chains_blocks_of_two_classes_are_no_chain():
    mixed = nn.Sequential(nn.TransformerEncoderLayer(4, 1, 4), nn.TransformerDecoderLayer(4, 1, 4))
    assert find_chains(nn.ModuleDict({'mixed': mixed})) == {}


def test_find_chains_one_block_is_no_chain():
    assert find_chains(nn.ModuleDict({'single': nn.Sequential(nn.TransformerEncoderLayer(4, 1, 4))})) == {}


class Stage(nn.Module):
    """Something with a chain inside: a stage of a hierarchical transformer, or a block of layers."""

    def __init__(self, depth: int, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.TransformerEncoderLayer(width, 1, width) for _ in range(depth))


def test_find_chains_list_of_stages_gives_the_chain_of_each():
    stages = nn.ModuleDict({'stages': nn.ModuleList([Stage(2), Stage(2), Stage(3)])})
    assert list(find_chains(stages)) == ['stages.0.inner', 'stages.1.inner', 'stages.2.inner']


def test_find_chains_inside_a_block_are_no_chains():
    blocks = nn.ModuleDict({'blocks': nn.ModuleList([Stage(2), Stage(2), Stage(2)])})
    assert list(find_chains(blocks)) == ['blocks']


def test_find_chains_blocks_that_share_no_weight_shape_are_no_chain():
    widths = nn.ModuleDict({'widths': nn.ModuleList(Stage(1, width) for width in (4, 6, 8))})
    assert find_chains(widths) == {}


@pytest.mark.parametrize(('index', 'replaced', 'expected'), [
    (2, [2], (1, 3)),
    (2, [2, 3], (1, 4)),
    (3, [2, 3], (1, 4)),
    (3, [1, 2, 3, 4], (0, 5)),
    (0, [0], (None, 1)),
    (5, [5], (4, None)),
    (1, [0, 1], (None, 2)),
])
def test_neighbours_are_the_nearest_kept(toy_net, index, replaced, expected):
    chain = find_chains(toy_net())['layer2']
    found = chain.neighbours(index, {'layer2': replaced})
    assert tuple(place and place.index for place in found) == expected


def test_block_name_uses_the_container_keys():
    container = nn.Sequential()
    container.add_module('first', nn.TransformerEncoderLayer(4, 1, 4))
    container.add_module('second', nn.TransformerEncoderLayer(4, 1, 4))
    assert Chain('stage', container).block_name(1) == 'stage.second'


def test_why_not_first_block(toy_net):
    assert find_chains(toy_net())['layer2'].why_not(0) == 'no kept block before it in its stage'


def test_why_not_last_block(toy_net):
    assert find_chains(toy_net())['layer2'].why_not(5) == 'no kept block after it in its stage'


def test_why_not_when_all_blocks_before_are_replaced(toy_net):
    chain = find_chains(toy_net())['layer2']
    assert chain.why_not(1, {'layer2': [0, 1]}) == 'no kept block before it in its stage'


def test_why_not_interior_block_is_none(toy_net):
    assert find_chains(toy_net())['layer2'].why_not(3) is None


def test_why_not_frozen_stage(toy_net):
    net = toy_net()
    net.layer2.requires_grad_(False)
    assert 'frozen' in find_chains(net)['layer2'].why_not(2)


def test_why_not_partly_frozen_stage_is_none(toy_net):
    net = toy_net()
    net.layer2[:5].requires_grad_(False)
    assert find_chains(net)['layer2'].why_not(2) is None


def test_why_not_no_shape_equal_neighbour_names_the_tensor():
    chain = Chain('wide', nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, size) for size in (4, 6, 4))))
    assert chain.why_not(1).startswith('linear1.weight (6, 4) has no tensor of its shape in a kept block '
                                             'of its stage, such as wide.0 or wide.2')


def test_why_not_one_side_without_any_equal_shape_names_it():
    chain = Chain('wide', nn.Sequential(*(nn.TransformerEncoderLayer(size, 1, size) for size in (2, 8, 8))))
    assert chain.why_not(1) == 'no kept block before it has a tensor of its shapes'


def test_replaceable_is_the_interior(toy_net):
    assert find_chains(toy_net())['layer2'].replaceable() == [1, 2, 3, 4]


def test_sources_one_shape_equal_neighbour(toy_net):
    chain = find_chains(toy_net())['layer1']
    assert chain.sources(1)['conv1.weight'] == (None, Place(chain, 2))


def test_sources_both_shapes_equal(toy_net):
    chain = find_chains(toy_net())['layer1']
    assert {sides for name, sides in chain.sources(1).items() if name != 'conv1.weight'} == {
        (Place(chain, 0), Place(chain, 2))}


def windowed(*sizes: int) -> Chain:
    """A chain of layers that differ in the size of one table."""
    blocks = [nn.TransformerEncoderLayer(4, 1, 4) for _ in sizes]
    for block, size in zip(blocks, sizes, strict=True):
        block.table = nn.Parameter(torch.zeros(size))
    return Chain('blocks', nn.Sequential(*blocks))


@pytest.mark.parametrize(('index', 'replaced', 'table'), [
    (1, [1], (0, 3)),        # the block after it has a table of another size, the one behind that the right one
    (3, [3], (1, 4)),
    (2, [2], (None, 5)),     # only one other block of its kind
    (3, [1, 3, 4], (0, 6)),  # the nearest ones of its kind are replaced as well
])
def test_sources_of_another_size_come_from_the_nearest_block_that_has_the_right_one(index, replaced, table):
    sources = windowed(7, 7, 9, 7, 7, 9, 7).sources(index, {'blocks': replaced})
    sources = {name: tuple(place and place.index for place in sides) for name, sides in sources.items()}
    assert sources['table'] == table
    before = max(i for i in range(index) if i not in replaced)
    after = min(i for i in range(index + 1, 7) if i not in replaced)
    assert sources['linear1.weight'] == (before, after)


def test_replaceable_blocks_of_two_kinds():
    assert windowed(7, 7, 9, 7, 7, 9, 7).replaceable() == [1, 2, 3, 4, 5]


def test_why_not_the_only_block_of_its_kind_names_the_tensor():
    assert windowed(7, 7, 9, 7).why_not(2).startswith('table (9,) has no tensor of its shape')


def test_find_chains_run_behind_another_module_is_called_like_the_container():
    stage = nn.Sequential(nn.Conv2d(3, 4, 1), *(nn.TransformerEncoderLayer(4, 1, 4) for _ in range(3)))
    [chain] = find_chains(nn.ModuleDict({'stage': stage})).values()
    assert (chain.name, len(chain), chain.block_name(0)) == ('stage', 3, 'stage.1')


def test_find_chains_two_runs_in_one_container_are_called_by_their_places():
    layers = [nn.TransformerEncoderLayer(4, 1, 4) for _ in range(3)]
    stage = nn.Sequential(*layers, nn.Conv2d(4, 4, 1), *(nn.TransformerDecoderLayer(4, 1, 4) for _ in range(2)))
    chains = find_chains(nn.ModuleDict({'stage': stage}))
    assert {name: chain.keys for name, chain in chains.items()} == {
        'stage[0:3]': ['0', '1', '2'], 'stage[4:6]': ['4', '5']}


class Numbered(nn.Module):
    """A stage that numbers its blocks itself."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.TransformerEncoderLayer(4, 1, 4))


def test_find_chains_children_that_are_numbered_are_a_chain():
    [chain] = find_chains(nn.ModuleDict({'stage': Numbered('b1', 'b2', 'b3')})).values()
    assert (chain.name, chain.keys) == ('stage', ['b1', 'b2', 'b3'])


@pytest.mark.parametrize('names', [('first', 'second', 'third'), ('b1', 'b3', 'b5'), ('a1', 'b2', 'c3')])
def test_find_chains_children_that_are_not_numbered_in_order_are_no_chain(names):
    assert find_chains(nn.ModuleDict({'stage': Numbered(*names)})) == {}
