"""FullBlock with ``only``: named submodules of a block are replaced, all else of it stays the block's own."""
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rl_mmdet.replacement import materialize, replace_blocks_, set_step_, stale_norms
from rl_mmdet.replacement.operators import FullBlock

BLOCKS = {'layer1': [1], 'layer2': [2, 3]}
NAMES = ('layer1.1', 'layer2.2', 'layer2.3')
ONLY = ('conv1', 'norm1')


class Scaled(nn.Module):
    """A residual unit with a parameter of its own beside its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.mlp(self.mix(x).tanh())


@pytest.fixture
def build(toy_net, randomise_):
    """A ToyNet with some submodules of blocks replaced, and random numbers; the same one at every call."""
    def make(only=ONLY, blocks=BLOCKS, gradient=None, **settings) -> nn.Module:
        net = toy_net()
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks=blocks), operator=dict(type='FullBlock', only=only),
                                  gradient=gradient or dict(every=1), **settings))
        return randomise_(net)
    return make


@pytest.fixture
def scaled() -> nn.Module:
    """Three such units, the second one with its ``mix`` replaced."""
    net = nn.Sequential(Scaled(), Scaled(), Scaled())
    replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2), operator=dict(type='FullBlock', only='mix')))
    return net


def gone(keys, only=ONLY) -> set[str]:
    return {key for key in keys if key.startswith(tuple(f'{name}.{part}.' for name in NAMES for part in only))}


@pytest.mark.parametrize('only', ['conv2', ONLY, ['norm1']])
def test_only_the_named_submodules_lose_their_parameters(build, toy_net, only):
    baseline, net = toy_net(), build(only)
    buffers = {name for name, _ in baseline.named_buffers()}
    missing = gone(baseline.state_dict(), [only] if isinstance(only, str) else only) - buffers
    assert missing
    assert set(net.state_dict()) == set(baseline.state_dict()) - missing | {f'{name}.coeff' for name in NAMES}
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_materialized_it_is_the_baseline_with_the_same_outputs_and_its_own_tensors(build, toy_net, image):
    net = build()
    plain = materialize(net)
    assert list(plain.state_dict()) == list(toy_net().state_dict())
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in toy_net().named_modules()]
    for key in plain.state_dict().keys() & net.state_dict().keys():
        assert torch.equal(plain.state_dict()[key], net.state_dict()[key]), key
    before, after = net.layer2[1].conv1.weight, net.layer2[4].conv1.weight
    a, b = net.layer2[2].coeff
    torch.testing.assert_close(plain.layer2[2].conv1.weight, a * before + b * after)
    for each in (net, plain):
        each.eval()
    torch.testing.assert_close(net(image), plain(image))


@pytest.mark.parametrize('gradient', [dict(every=1), dict(every=8), dict(every=8, recompute=True),
                                      dict(mode='coupled')], ids=str)
def test_what_is_the_blocks_own_learns_in_every_step_as_in_the_plain_model(build, image, gradients, assert_same,
                                                                           gradient):
    net = build(gradient=gradient).double()
    set_step_(net, 1)
    wanted, found = gradients(materialize(net), image.double()), gradients(net, image.double())
    own = {name for name in found if name.startswith(NAMES) and not name.endswith('coeff')}
    assert len(own) == 3 * 4
    assert_same({name: found[name] for name in own}, {name: wanted[name] for name in own})
    assert {name for name, _ in net.named_parameters()} <= set(found)
    assert [bool(found[f'{name}.coeff'].any()) for name in NAMES] == [gradient.get('every') != 8] * 3


def test_all_norms_of_the_block_want_new_statistics(build):
    net = build().eval()
    assert {id(norm) for norm in stale_norms(net)} == {
        id(norm) for name in NAMES for norm in (net.get_submodule(name).norm1, net.get_submodule(name).norm2)}


def test_a_copy_has_a_life_of_its_own(build, image, randomise_):
    net = build().eval()
    twin, expected = copy.deepcopy(net), net(image)
    assert torch.equal(twin(image), expected)
    randomise_(net, seed=4)
    assert torch.equal(twin(image), expected)
    randomise_(twin, seed=4)
    assert torch.equal(twin(image), net(image))


def test_parameters_of_the_block_itself_stay_its_own(scaled):
    net, x = copy.deepcopy(scaled), torch.randn(2, 4)
    assert set(net[1].state_dict()) == {'coeff', 'gamma', 'mlp.weight', 'mlp.bias'}
    set_step_(net, 1)
    net(x).square().sum().backward()
    assert net[1].gamma.grad.any()
    assert not net[1].coeff.grad.any()
    plain = materialize(net)
    assert list(plain[1].state_dict()) == list(plain[0].state_dict())
    torch.testing.assert_close(net(x), plain(x))
    given = {key: torch.rand_like(value) for key, value in net.state_dict().items()}
    expected = functional_call(net, given, (x,))
    net.load_state_dict(given)
    torch.testing.assert_close(net.double()(x.double()).float(), expected)


def test_own_weights_may_fix_what_was_named_alone(build):
    net = build(fusion=dict(type='OwnWeights', learn=False))
    fixed = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert fixed == gone(dict(net.named_parameters()))


@pytest.mark.parametrize('fusion', ['ScalarFusion', 'OwnWeights'])
def test_report_counts_what_was_removed_and_added(toy_net, fusion):
    net = toy_net()
    before = sum(p.numel() for p in net.parameters())
    report = replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2), fusion=dict(type=fusion),
                                       operator=dict(type='FullBlock', only=ONLY)))
    assert report.removed_parameters == 3 * (4 * 4 * 9 + 2 * 4)
    assert report.learnable == (3 * 2 if fusion == 'ScalarFusion' else report.removed_parameters)
    assert sum(p.numel() for p in net.parameters()) == before - report.removed_parameters + report.learnable
    assert 'layer2.1 (Unit): conv1 and norm1 replaced, from layer2.0 and layer2.2; learns' in str(report)


@pytest.mark.parametrize(('only', 'error', 'why'), [
    ('attn', ValueError, r"only='attn', but a Unit has no such submodule; it has conv1, norm1, conv2, norm2"),
    (('conv1', 'conv1.weight'), ValueError, "only='conv1.weight', but a Unit has no such submodule"),
    ('act', ValueError, "only='act', but a Unit's act has no parameters; those with some: conv1, norm1, conv2, norm2"),
    (['conv1', 'norm1', 'conv2', 'norm2'], ValueError, r'only=.* is all that a Unit has; leave it out'),
    ([], ValueError, r'FullBlock: only=\[\] names no submodule; leave it out'),
    ('', ValueError, "FullBlock: only='' names no submodule; leave it out"),
    (2, TypeError, "only must be a submodule's name such as 'attn', or a list of names, got 2"),
    ([None], TypeError, r'or a list of names, got \[None\]'),
])
def test_names_that_say_nothing_are_refused(toy_net, snapshot, only, error, why):
    net = toy_net()
    before = snapshot(net)
    with pytest.raises(error, match=why) as caught:
        replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2), operator=dict(type='FullBlock', only=only)))
    assert '\n' not in str(caught.value)
    assert str(snapshot(net)) == str(before)


def test_light_operators_stand_for_whole_blocks(toy_net):
    with pytest.raises(ValueError, match="SlimBlock has no argument 'only'"):
        replace_blocks_(toy_net(), dict(plan=dict(type='EveryKth', k=2), operator=dict(type='SlimBlock', only='conv1')))


def test_repr_is_what_a_config_says():
    assert [repr(FullBlock()), repr(FullBlock('attn'))] == ['FullBlock()', "FullBlock(only=('attn',))"]
