"""Chains: where they are found, whose tensors are used, who can't be replaced; with and without other sizes."""
import pytest
import torch
from mmdet.models.backbones import ResNet
from torch import Tensor, nn

from rl_mmdet.replacement import find_chains, replace_blocks_
from rl_mmdet.replacement.chain import Chain, describe_replaceable


def layer(width: int = 4, hidden: int = 4) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 1, hidden)


def layers(count: int) -> list[nn.Module]:
    return [layer() for _ in range(count)]


def names(places) -> tuple:
    return tuple(place and place.name for place in places)


# Where they are found

class Stage(nn.Module):
    """Something with a chain inside: a stage of a hierarchical transformer, or a block of layers."""

    def __init__(self, depth: int, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.ModuleList(layer(width, width) for _ in range(depth))


class Numbered(nn.Module):
    """A stage that names its blocks itself."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, layer())


@pytest.mark.parametrize(('build', 'expected'), [
    (lambda: nn.ModuleDict({'blocks': nn.ModuleList(layers(3))}), {'blocks': 3}),
    (lambda: nn.Sequential(*layers(3)), {'': 3}),
    (lambda: nn.ModuleList([Stage(2), Stage(2), Stage(3)]), {'0.inner': 2, '1.inner': 2, '2.inner': 3}),  # stages
    (lambda: nn.ModuleDict({'blocks': nn.ModuleList([Stage(2), Stage(2), Stage(2)])}), {'blocks': 3}),  # blocks
    (lambda: nn.ModuleDict({'stage': nn.Sequential(nn.Conv2d(3, 4, 1), *layers(3))}), {'stage': 3}),
    (lambda: nn.ModuleDict({'stage': Numbered('b1', 'b2', 'b3')}), {'stage': 3}),
    # none
    (lambda: nn.ModuleDict({'stage': Numbered('first', 'second', 'third')}), {}),
    (lambda: nn.ModuleDict({'stage': Numbered('b1', 'b3', 'b5')}), {}),
    (lambda: nn.ModuleDict({'stage': Numbered('a1', 'b2', 'c3')}), {}),
    (lambda: nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3)), {}),  # no residual units
    (lambda: nn.Sequential(layer(), nn.TransformerDecoderLayer(4, 1, 4)), {}),  # two classes
    (lambda: nn.Sequential(layer()), {}),
    (lambda: nn.ModuleList(Stage(1, width) for width in (4, 6, 8)), {}),  # no weight of the same shape
])
def test_find_chains(build, expected):
    assert {name: len(chain) for name, chain in find_chains(build()).items()} == expected


def test_find_chains_inside_a_wrapper_have_qualified_names(toy_net):
    chains = find_chains(nn.ModuleDict({'backbone': toy_net()}))
    assert list(chains) == ['backbone.layer1', 'backbone.layer2']
    assert chains['backbone.layer2'].block_name(1) == 'backbone.layer2.1'


def test_find_chains_two_runs_in_one_container_are_called_by_their_places():
    stage = nn.Sequential(*layers(3), nn.Conv2d(4, 4, 1), *(nn.TransformerDecoderLayer(4, 1, 4) for _ in range(2)))
    chains = find_chains(nn.ModuleDict({'stage': stage}))
    assert {name: chain.keys for name, chain in chains.items()} == {
        'stage[0:3]': ['0', '1', '2'], 'stage[4:6]': ['4', '5']}


# Whose tensors are used

@pytest.mark.parametrize(('index', 'replaced', 'expected'), [
    (2, [2], (1, 3)), (2, [2, 3], (1, 4)), (3, [2, 3], (1, 4)), (3, [1, 2, 3, 4], (0, 5)), (0, [0], (None, 1))])
def test_neighbours_are_the_nearest_kept(toy_net, index, replaced, expected):
    chain = find_chains(toy_net())['layer2']
    found = chain.neighbours(index, {'layer2': replaced})
    assert tuple(place and place.index for place in found) == expected


def test_donors_are_the_neighbours_whose_tensor_has_the_shape(toy_net):
    donors = find_chains(toy_net())['layer1'].donors(1)
    assert names(donors.pop('conv1.weight')) == (None, 'layer1.2')
    assert {names(sides) for sides in donors.values()} == {('layer1.0', 'layer1.2')}


def windowed(*sizes: int) -> Chain:
    """A chain of layers that differ in the size of one table."""
    blocks = layers(len(sizes))
    for block, size in zip(blocks, sizes, strict=True):
        block.table = nn.Parameter(torch.zeros(size))
    return Chain('blocks', nn.Sequential(*blocks))


@pytest.mark.parametrize(('index', 'replaced', 'table', 'others'), [
    (1, [1], (0, 3), (0, 2)),  # the block after it has a table of another size, the one behind that the right one
    (3, [3], (1, 4), (2, 4)),
    (2, [2], (None, 5), (1, 3)),  # only one other block of its kind
    (3, [1, 3, 4], (0, 6), (2, 5)),  # the nearest ones of its kind are replaced as well
])
def test_donors_of_another_size_come_from_the_nearest_block_that_has_the_right_one(index, replaced, table, others):
    donors = windowed(7, 7, 9, 7, 7, 9, 7).donors(index, {'blocks': replaced})
    found = {name: tuple(place and place.index for place in sides) for name, sides in donors.items()}
    assert (found['table'], found['linear1.weight']) == (table, others)


# Who can be replaced

def test_replaceable_is_the_interior(toy_net):
    assert find_chains(toy_net())['layer2'].replaceable() == [1, 2, 3, 4]
    assert windowed(7, 7, 9, 7, 7, 9, 7).replaceable() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(('index', 'choice', 'reason'), [
    (0, [], 'no kept block before it in its stage'), (5, [], 'no kept block after it in its stage'),
    (1, [0, 1], 'no kept block before it in its stage'), (3, [], None)])
def test_why_not_at_the_ends(toy_net, index, choice, reason):
    assert find_chains(toy_net())['layer2'].why_not(index, {'layer2': choice}) == reason


def test_why_not_frozen_blocks_and_stages(toy_net):
    net = toy_net()
    net.layer2[:3].requires_grad_(False)
    net.layer2[3].conv1.requires_grad_(False)
    chain = find_chains(net)['layer2']
    assert [chain.why_not(index) for index in (2, 3)] == ['it is frozen (no parameter learns)', None]
    net.layer2.requires_grad_(False)
    assert find_chains(net)['layer2'].why_not(2) == 'its stage is frozen (no parameter learns)'
    net.requires_grad_(False)
    assert describe_replaceable(find_chains(net)) == (
        'blocks that can be replaced: none (its stage is frozen (no parameter learns))')


@pytest.mark.parametrize(('chain', 'index', 'reason'), [
    (lambda: Chain('wide', nn.Sequential(*(layer(4, size) for size in (4, 6, 4)))), 1,
     'linear1.weight (6, 4) has no tensor of its shape in a kept block of its stage, such as wide.0 or wide.2'),
    (lambda: windowed(7, 7, 9, 7), 2,
     'table (9,) has no tensor of its shape in a kept block of its stage, such as blocks.1 or blocks.3'),
    (lambda: Chain('wide', nn.Sequential(*(layer(size, size) for size in (2, 8, 8)))), 1,
     'no kept block before it has a tensor of its shapes'),
])
def test_why_not_shapes_that_nobody_has(chain, index, reason):
    assert chain().why_not(index) == reason


# With tensors of other sizes

@pytest.fixture(scope='module')
def adapted() -> dict[str, Chain]:
    """The chains of an R-50."""
    return find_chains(ResNet(50, base_channels=4), adapt=True)


@pytest.mark.parametrize(('stage', 'index', 'choice', 'expected'), [
    ('layer1', 0, {}, (None, 'layer1.1')),
    ('layer2', 0, {}, ('layer1.2', 'layer2.1')),
    ('layer4', 2, {}, ('layer4.1', None)),
    ('layer2', 0, {'layer1': [2], 'layer2': [0]}, ('layer1.1', 'layer2.1')),  # a replaced block there is skipped
    ('layer2', 0, {'layer1': [0, 1, 2], 'layer2': [0]}, (None, 'layer2.1')),  # so is a whole stage
    ('layer3', 2, {'layer3': range(6)}, ('layer2.3', 'layer4.0')),
])
def test_adapted_neighbours_are_the_nearest_kept_of_all_stages(adapted, stage, index, choice, expected):
    assert names(adapted[stage].neighbours(index, choice)) == expected


@pytest.mark.parametrize(('stage', 'index', 'choice', 'tensor', 'expected'), [
    # the right size in the own stage is preferred to a nearer block of another size
    ('layer2', 2, {'layer2': [2]}, 'conv1.weight', ('layer2.1', 'layer2.3')),
    ('layer2', 3, {'layer2': [2, 3]}, 'conv1.weight', ('layer2.1', 'layer3.0')),
    # only first blocks have a downsample
    ('layer2', 0, {'layer2': [0], 'layer3': [0]}, 'downsample.0.weight', ('layer1.0', 'layer4.0')),
    ('layer1', 0, {}, 'downsample.0.weight', (None, 'layer2.0')),
    ('layer4', 0, {}, 'downsample.1.bias', ('layer3.0', None)),
])
def test_adapted_donors(adapted, stage, index, choice, tensor, expected):
    assert names(adapted[stage].donors(index, choice)[tensor]) == expected


def test_adapted_every_block_can_be_replaced(adapted):
    assert [len(chain.replaceable()) for chain in adapted.values()] == [3, 4, 6, 3]


class Sized(nn.Module):
    """A residual unit whose second weight has a size of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, size), nn.Linear(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.three(self.two(self.one(x)))


def sized(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*map(Sized, sizes))


def test_adapted_the_right_size_is_looked_for_in_the_own_stage_only():
    donors = find_chains(sized(8, 6, 8, 6), adapt=True)[''].donors(2)
    assert (names(donors['two.weight']), names(donors['one.weight'])) == (('0', '3'), ('1', '3'))
    chains = find_chains(nn.ModuleDict({'a': sized(8, 8), 'b': sized(6, 8, 6)}), adapt=True)
    assert names(chains['b'].donors(1)['two.weight']) == ('b.0', 'b.2')


def test_adapted_stages_of_other_blocks_are_no_neighbours(toy_net):
    chains = find_chains(nn.Sequential(sized(4, 4), toy_net().layer2, sized(6, 6)), adapt=True)
    assert names(chains['0'].neighbours(1)) == ('0.0', '2.0')
    assert names(chains['1'].neighbours(0)) == (None, '1.1')


@pytest.mark.parametrize(('build', 'blocks', 'message'), [
    (lambda net: sized(8, 8), {'': [0, 1]}, 'no kept block before it in its model'),
    (lambda net: net, {'layer1': [0]},  # it alone has a shortcut
     r'no kept block has a tensor shortcut\.weight.*nearest: layer1\.1'),
])
def test_adapted_what_nobody_has_is_named(toy_net, build, blocks, message):
    with pytest.raises(ValueError, match=message):
        replace_blocks_(build(toy_net()), dict(plan=dict(type='Blocks', blocks=blocks), fusion=dict(adapt=True)))
