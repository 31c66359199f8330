"""Gradients: how it learns. Who gets gradient from a replaced block, in which steps, and that its value is right."""
import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from rl_mmdet.replacement import computing_layers, materialize, replace_blocks_, set_step_
from rl_mmdet.replacement.flops import count_flops
from rl_mmdet.replacement.gradient import Gradient

OPERATORS = ['FullBlock', 'SlimBlock']
FIVE = {'layer1': [1], 'layer2': [1, 2, 3, 4]}
operators = pytest.mark.parametrize('operator', OPERATORS)
modes = pytest.mark.parametrize('mode', Gradient.MODES)
slow = pytest.mark.slow
training = pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])


@pytest.fixture
def make(replaced):
    """A replaced ToyNet in float64, in training mode."""
    def build(every: int | None = 4, operator: str = 'FullBlock', **settings) -> nn.Module:
        gradient = dict(settings.pop('gradient', {}), every=every)
        return replaced(operator=dict(type=operator), gradient=gradient, **settings).double().train()
    return build


@pytest.fixture
def image(image) -> Tensor:
    return image.double()


def learned(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of what computing layers learn."""
    return {name: value for name, value in found.items() if name.endswith(('coeff', 'scale'))}


def features() -> Tensor:
    """What comes into layer2."""
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(4)).double()


# In every step

def by_hand(net: nn.Module, mode: str) -> dict[str, Tensor]:
    """The materialized model's weights, written as a·θ_p + b·θ_n of the replaced model's parameters."""
    tensors = dict(net.named_parameters())
    for block, before, after in [('layer1.1', 'layer1.0', 'layer1.2'), ('layer2.2', 'layer2.1', 'layer2.4'),
                                 ('layer2.3', 'layer2.1', 'layer2.4')]:
        a, b = tensors.pop(f'{block}.coeff')
        for name, _ in net.get_submodule(after).named_parameters():
            p, n = (net.get_parameter(f'{side}.{name}') for side in (before, after))
            if mode == 'detached':
                p, n = p.detach(), n.detach()
            tensors[f'{block}.{name}'] = b * n if p.shape != n.shape else a * p + b * n
    return tensors


@modes
@training
def test_every_step_is_plain_autograd_on_the_made_weights(make, gradients, assert_same, image, mode, train):
    net = make(every=1, gradient=dict(mode=mode)).train(train)
    plain, expected = materialize(net).train(train), by_hand(net, mode)
    assert_same(gradients(net, image), gradients(net, image, lambda x: functional_call(plain, expected, (x,))))


@modes
def test_frozen_neighbours_still_give_the_coefficients_gradient(make, gradients, image, mode):
    net = make(every=1, gradient=dict(mode=mode))
    expected = gradients(net, image)['layer2.2.coeff']
    for index in (1, 4):
        net.layer2[index].requires_grad_(False)
    torch.testing.assert_close(gradients(net, image)['layer2.2.coeff'], expected)


def test_a_neighbour_changed_in_place_before_backward_raises(make, image):
    net = make(every=1, gradient=dict(mode='coupled'))
    out = net(image)
    with torch.no_grad():
        net.layer2[1].conv1.weight.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


# In every k-th step

@pytest.mark.parametrize(('operator', 'staggered'), [*((each, True) for each in OPERATORS), ('FullBlock', False)])
def test_mean_over_the_steps_is_the_gradient_of_every_step(make, gradients, assert_same, image, operator, staggered):
    found, net = [], make(4, operator)
    for step in range(8):
        set_step_(net, step, staggered)
        found.append(gradients(net, image))
    mean = {name: torch.stack([each[name] for each in found]).mean(0) for name in found[0]}
    assert_same(mean, gradients(make(1, operator), image), 1e-9)


@operators
def test_between_its_turns_a_block_gets_zeros_and_computes_no_weight_gradient(make, operator):
    layer = make(4, operator).layer2[2]
    x, flops = features().requires_grad_(), {}
    for step in (0, 1):
        set_step_(layer, step)
        layer.zero_grad()
        flops[step] = count_flops(lambda: layer(x).sum().backward())
        assert all(bool(p.grad.any()) == (step == 0) for p in layer.parameters())
    forward = count_flops(lambda: materialize(nn.Sequential(layer))(x))
    assert (flops[0], flops[1]) == (3 * forward, 2 * forward)


def test_between_its_turns_a_block_keeps_nothing_for_weight_gradients(make):
    layer = nn.Sequential(make(4).layer2[2]).eval()
    kept = []
    for step in (0, 1):
        set_step_(layer, step)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            layer(features().requires_grad_())
        kept.append(sum(saved))
    assert kept[1] < kept[0]


@pytest.mark.parametrize('every', [2, 3, 4, 8])
def test_blocks_take_turns(make, every):
    net = make(every, blocks=FIVE)
    layers = computing_layers(net).values()
    turns = []
    for step in range(2 * every):
        set_step_(net, step)
        turns.append([layer.turn for layer in layers])
    assert max(map(sum, turns)) <= math.ceil(5 / every)
    assert [sum(turn) for turn in zip(*turns, strict=True)] == [2] * 5
    for step in range(2 * every):
        set_step_(net, step, staggered=False)
        assert {layer.turn for layer in layers} == {step % every == 0}


def test_a_training_that_goes_on_has_the_same_turns(make, gradients, assert_same, image):
    net, resumed = make(4), make(4)
    for step in range(6):
        set_step_(net, step)
        expected = gradients(net, image)
    set_step_(resumed, 5)
    assert_same(gradients(resumed, image), expected, 0)


@operators
def test_uncounted_blocks_learn_in_every_step(make, gradients, assert_same, image, operator):
    net = make(3, operator)
    for _ in range(4):
        assert_same(gradients(net, image), gradients(make(1, operator), image), 0)


# Where trainings do more than one forward and one backward run

@operators
@pytest.mark.parametrize('reentrant', [True, False])
def test_activation_checkpoint_around_the_model(make, gradients, assert_same, image, operator, reentrant):
    net = make(2, operator)
    for step in range(3):
        found = []
        for run in (None, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
            set_step_(net, step)
            found.append(gradients(net, image, run))
        assert_same(found[1], found[0])


@operators
def test_loss_scale_scales_the_gradients(make, gradients, assert_same, image, operator):
    net = make(4, operator)
    for step in range(4):
        set_step_(net, step)
        expected, scaled = gradients(net, image), gradients(net, image, scale=2. ** 16)
        assert_same({name: value / 2 ** 16 if name != 'out' else value for name, value in scaled.items()}, expected, 0)


@pytest.mark.parametrize(('operator', 'mode'), [('FullBlock', 'detached'), ('SlimBlock', 'detached'),
                                                ('SlimBlock', 'coupled')])
def test_autocast_gradients_are_float32_and_near(make, gradients, image, operator, mode):
    net = make(None, operator, gradient=dict(mode=mode)).float().eval()
    for step in range(2):
        set_step_(net, step, staggered=False)
        expected = gradients(net, image.float())
        with torch.autocast('cpu', dtype=torch.bfloat16):
            actual = gradients(net, image.float())
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert name == 'out' or actual[name].dtype == torch.float32
            assert (actual[name].float() - value).norm() <= 0.2 * value.norm(), name


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
                         ids=['deepcopy', 'pickle'])
def test_a_copy_learns_in_the_same_steps(make, gradients, assert_same, image, duplicate):
    net = make(4, 'SlimBlock')
    twin = duplicate(net)
    assert list(twin.state_dict()) == list(make(1, 'SlimBlock').state_dict())
    for step in range(4):
        for each in (net, twin):
            set_step_(each, step)
        assert_same(gradients(twin, image), gradients(net, image), 0)


# Compiled

@pytest.fixture
def fresh_compiler():
    if torch.__version__ < (2, 3):
        pytest.skip('torch before 2.3 compiles computing layers in more graphs than one')
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures('fresh_compiler')
@pytest.mark.parametrize('operator', ['SlimBlock', pytest.param('FullBlock', marks=slow)])
def test_compiled_and_counted_there_are_two_graphs(make, gradients, assert_same, operator):
    net, x = make(2, operator).layer2[2:4], features()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for step in range(4):
        set_step_(net, step, staggered=False)
        assert_same(gradients(net, x, compiled), gradients(net, x))
        assert counter.frame_count == min(step + 1, 2)


@pytest.mark.usefixtures('fresh_compiler')
@pytest.mark.parametrize('mode', ['detached', pytest.param('coupled', marks=slow)])
@pytest.mark.parametrize('operator', ['FullBlock', pytest.param('SlimBlock', marks=slow)])
def test_compiled_and_uncounted_there_is_one_graph_that_learns_in_every_step(make, gradients, assert_same, operator,
                                                                           mode):
    net, plain = (make(every, operator, gradient=dict(mode=mode)).layer2[2:4] for every in (None, 1))
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for _ in range(2):
        assert_same(gradients(net, features(), compiled), gradients(plain, features()))
    assert counter.frame_count == 1


# Settings

def test_defaults_are_detached_and_every_eighth_step():
    assert (Gradient().mode, Gradient().every, Gradient('coupled').every) == ('detached', 8, 1)


@pytest.mark.parametrize(('gradient', 'error', 'message'), [
    (dict(mode='frozen'), ValueError, "unknown mode 'frozen'; allowed: detached, coupled"),
    (dict(every=0), ValueError, 'every must be an integer of at least 1, got 0'),
    (dict(every=True), ValueError, 'every must be an integer of at least 1, got True'),
    (dict(every=0.5), ValueError, 'every must be an integer of at least 1, got 0.5'),
    (dict(recompute='yes'), TypeError, "recompute must be True, False or None, got 'yes'"),
    (dict(recompute=1), TypeError, 'recompute must be True, False or None, got 1'),
    (dict(mode='coupled', every=4), ValueError, "every=4 goes with mode='detached' only: .*; leave every out"),
    (dict(kind='x'), ValueError, "Gradient has no argument 'kind'; allowed: mode, every, recompute"),
    ('coupled', TypeError, r"must be a dict such as dict\(mode='detached'\), got 'coupled'"),
])
def test_wrong_settings_are_named_in_one_line(toy_net, gradient, error, message):
    with pytest.raises(error, match=rf'replacement\.gradient:? {message}') as caught:
        replace_blocks_(toy_net(), dict(plan=dict(type='EveryKth', k=2), gradient=gradient))
    assert '\n' not in str(caught.value)
