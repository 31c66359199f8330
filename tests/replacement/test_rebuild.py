"""What a computing layer needn't keep: made again in backward, with the same numbers, or refused."""
import copy
import gc
import pickle
import weakref

import pytest
import torch
from mmdet.models.backbones.resnet import Bottleneck
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rl_mmdet.replacement import computing_layers, materialize, replace_blocks_, set_step_
from rl_mmdet.replacement.saved_bytes import saved_bytes

CASES = [('FullBlock', True), ('SlimBlock', None), ('SlimBlock', True)]
cases = pytest.mark.parametrize(('operator', 'recompute'), CASES, ids=[f'{o}-{r}' for o, r in CASES])


@pytest.fixture
def make(replaced):
    """A replaced ToyNet in float64, in training mode."""
    def build(operator: str, recompute: bool | None, every: int = 1, mode: str = 'detached') -> nn.Module:
        gradient = dict(mode=mode, every=every, recompute=recompute)
        return replaced(operator=dict(type=operator), gradient=gradient).double().train()
    return build


@pytest.fixture
def image(image) -> Tensor:
    return image.double().requires_grad_()


@cases
@pytest.mark.parametrize('mode', ['detached', 'coupled'])
def test_outputs_gradients_and_statistics_are_the_same(make, gradients, assert_same, assert_same_state, image, operator,
                                                       recompute, mode):
    net, kept = (make(operator, each, mode=mode) for each in (recompute, False))
    for _ in range(2):
        assert_same(gradients(net, image), gradients(kept, image))
        assert_same_state(dict(net.named_buffers()), dict(kept.named_buffers()))


@cases
def test_so_they_are_in_steps_without_a_turn(make, gradients, assert_same, image, operator, recompute):
    net, kept = (make(operator, each, every=3) for each in (recompute, False))
    for step in range(3):
        for each in (net, kept):
            set_step_(each, step)
        assert_same(gradients(net, image), gradients(kept, image))


@cases
def test_less_is_kept(make, image, operator, recompute):
    net, kept = (make(operator, each) for each in (recompute, False))
    assert saved_bytes(net, lambda: net(image)) < saved_bytes(kept, lambda: kept(image))


def alive(net: nn.Module, block: str, image: Tensor, run=None) -> bool:
    """Whether a block's output is still there between forward and backward."""
    outputs = []
    hook = net.get_submodule(block).register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))
    out = net(image) if run is None else run(image)
    hook.remove()
    found = outputs[0]() is not None
    out.sum().backward()
    return found


def test_by_default_light_operators_outputs_are_not_kept(make, image):
    assert not alive(make('SlimBlock', None), 'layer1.1', image)
    assert not alive(make('SlimBlock', None, every=8), 'layer1.1', image)
    assert alive(make('SlimBlock', False), 'layer1.1', image)


@pytest.mark.parametrize('backward', [True, False])
def test_nothing_outlives_a_step_or_a_graph_that_is_dropped(make, image, backward):
    net, outputs = make('SlimBlock', None), []
    for block in (*net.layer1, *net.layer2):
        block.register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))
        block.act = nn.Tanh()  # keeps its result
    gc.disable()  # it would free a cycle some time
    try:
        loss = net(image).sum()
        if backward:
            loss.backward()
        del loss
        assert [output() for output in outputs] == [None] * 9
    finally:
        gc.enable()


@pytest.mark.parametrize('reentrant', [True, False])
def test_under_an_activation_checkpoint_nothing_more_is_kept(make, image, reentrant):
    net = make('SlimBlock', None)
    assert not alive(net, 'layer1.0', image, lambda x: checkpoint(net, x, use_reentrant=reentrant))


def test_full_blocks_keep_their_input_alone(make):
    net = nn.Sequential(make('FullBlock', True).layer2[2])
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(net, lambda: net(x)) == x.numel() * 8


def test_dropout_is_replayed(gradients, assert_same):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True) for _ in range(3)))
        replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2), gradient=dict(every=1, recompute=recompute)))
        torch.manual_seed(1)
        found.append(gradients(net.double().train(), torch.ones(2, 5, 8, dtype=torch.float64)))
    assert_same(found[1], found[0])


@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
@pytest.mark.parametrize(('operator', 'mode'), [('FullBlock', 'coupled'), ('SlimBlock', 'detached')])
def test_a_block_that_was_checkpointed_stays_so(randomise_, gradients, assert_same, operator, mode):
    nets = []
    for with_cp in (False, True):
        net = nn.Sequential(*(Bottleneck(16, 4, with_cp=with_cp) for _ in range(3)))
        replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2), operator=dict(type=operator),
                                  gradient=dict(mode=mode, every=1)))
        nets.append(randomise_(net).double().train())
    x = torch.randn(2, 16, 6, 6).double().requires_grad_()
    assert_same(*(gradients(net, x) for net in nets))
    assert saved_bytes(nets[1][1], lambda: nets[1][1](x)) < saved_bytes(nets[0][1], lambda: nets[0][1](x))
    assert getattr(materialize(nets[1])[1], 'with_cp', True)


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize(('operator', 'recompute'), CASES[:2])
def test_checkpoint_around_the_model(make, gradients, assert_same, image, operator, recompute, reentrant):
    net = make(operator, recompute)
    expected = gradients(make(operator, False), image)
    assert_same(gradients(net, image, lambda x: checkpoint(net, x, use_reentrant=reentrant)), expected)


def test_autocast_makes_the_same_again(make, gradients, assert_same, image):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = [gradients(make('SlimBlock', recompute).float(), image.detach().float()) for recompute in (None, False)]
    assert_same(*found, tolerance=0)


def test_channels_last_stays(make, gradients, assert_same, image):
    image = image.detach().to(memory_format=torch.channels_last)
    assert_same(*(gradients(make('SlimBlock', recompute).to(memory_format=torch.channels_last), image)
                  for recompute in (None, False)))


def test_backward_twice(make, image):
    net = make('SlimBlock', None)
    out = net(image).sum()
    twice = [torch.autograd.grad(out, list(net.parameters()), retain_graph=True, allow_unused=True) for _ in range(2)]
    for one, other in zip(*twice, strict=True):
        assert one is other is None or torch.equal(one, other)


class InPlace(nn.Module):
    """A residual unit that changes its input before anything is kept of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mul_(2)
        return x + self.conv2(self.conv1(x))


def test_blocks_may_change_their_input_in_place(randomise_, gradients, assert_same):
    found = []
    for recompute in (None, False):
        net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(InPlace(), InPlace(), InPlace()))
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'1': [1]}), operator=dict(type='SlimBlock'),
                                  gradient=dict(every=1, recompute=recompute)))
        found.append(gradients(randomise_(net).double(), torch.ones(1, 4, 5, 5).double()))
    assert_same(*found)


def test_an_input_changed_in_place_before_backward_raises(make, image):
    net = make('SlimBlock', None).layer1
    x = net[0](image)
    out = net[2](net[1](x))
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match='input of a computing layer was modified by an inplace .*recompute=False'):
        out.sum().backward()


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
                         ids=['deepcopy', 'pickle'])
def test_a_copy_keeps_as_little(make, gradients, assert_same, image, duplicate):
    net = make('SlimBlock', None)
    twin = duplicate(net)
    assert not alive(twin, 'layer1.1', image)
    assert_same(gradients(twin, image), gradients(net, image))


def test_a_materialized_model_has_no_hooks_left(make):
    net = make('SlimBlock', None)
    plain = materialize(net)
    assert computing_layers(net)
    assert not [module for module in plain.modules() if module._forward_pre_hooks or module._forward_hooks]
