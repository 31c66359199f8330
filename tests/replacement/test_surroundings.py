"""A replaced block among what people do to blocks: attributes, initialisers, threads, and other libraries' tools."""
import copy
import pickle
import threading
import time
from typing import Any

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune

from rl_mmdet.replacement import computing_layers, fit_outputs_, materialize, replace_blocks_
from rl_mmdet.replacement.saved_bytes import saved_bytes
from rl_mmdet.search.search_space import finish_search_

SEARCH = dict(type='LearnedPlan', budget=dict(params=0.9), epochs=1)


class Gained(nn.Module):
    """A block with an attribute that is there from the start, one that its stage gives it, and a method."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.gain = 1.
        self.H = None

    def residual(self, x: Tensor) -> Tensor:
        return self.gain * self.conv2(self.conv1(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)[..., :self.H, :]


class Stage(nn.Module):
    """Sets attributes of its blocks, as the original Swin does, and calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gained() for _ in range(3))
        self.given: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            block.H = x.shape[-2]
            for name, value in self.given.items():
                setattr(block, name, value)
            x = block(x)
        return x


@pytest.fixture
def features() -> Tensor:
    return torch.randn(2, 4, 6, 6)


def stage(**settings: Any) -> Stage:
    net = Stage()
    replace_blocks_(net, dict(dict(plan=dict(type='EveryKth', k=2)), **settings))
    return net


# Attributes

copies = pytest.mark.parametrize('copied', [
    lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=['itself', 'deepcopy', 'pickle'])


@copies
def test_what_a_stage_sets_on_its_blocks_reaches_what_runs(features, copied):
    net = copied(stage())
    keys, expected = list(net.state_dict()), materialize(net)
    torch.testing.assert_close(net(features), expected(features))
    net.given = expected.given = dict(gain=0)
    assert torch.equal(net(features), features)
    net.given = expected.given = dict(gain=2)
    torch.testing.assert_close(net(features), expected(features))
    assert (net.blocks[1].gain, net.blocks[1].H, materialize(net).blocks[1].gain) == (2, 6, 2)
    assert list(net.state_dict()) == keys
    del net.blocks[1].gain
    with pytest.raises(AttributeError, match='gain'):
        net.blocks[1](features)


@pytest.mark.slow
def test_compiled_what_a_stage_sets_reaches_what_runs(features):
    net = stage()
    net.given = dict(gain=0)
    assert torch.equal(torch.compile(net, backend='eager', fullgraph=True)(features), features)


def test_methods_that_a_stage_calls_run_on_the_made_weights(features):
    net = stage()
    expected = materialize(net).blocks[1].residual(features)
    torch.testing.assert_close(net.blocks[1].residual(features), expected)


def test_a_light_operator_takes_what_stages_tell_all_blocks_and_refuses_what_it_would_ignore(features):
    net = stage(operator=dict(type='SlimBlock'))
    net(features)
    net.given = dict(gain=0)
    with pytest.raises(AttributeError, match='gain=0 was set on a replaced block, but SlimBlock.*FullBlock'):
        net(features)


def test_a_removed_block_gets_them_as_long_as_it_is_there(features):
    net = stage(start=dict(type='FitOutputs'))
    for block in net.blocks:
        block.gain = 3
    assert net.blocks[1].removed.block.gain == 3
    error = fit_outputs_(net, [features], steps=1)['blocks.1']
    assert 0 < error.before < 10


def test_blocks_of_a_search_pass_them_on(features):
    net = stage(plan=SEARCH)
    net.given = dict(gain=0)
    with torch.no_grad():
        net(features)
    finish_search_(net, dict(blocks=[1]))
    net.given = {}
    assert torch.equal(net.blocks[1](features), features)


def test_with_cp_set_on_a_replaced_block_checkpoints_it(features):
    net, x = stage(gradient=dict(every=1)), features.requires_grad_()
    expected = torch.autograd.grad(net.blocks[1](x).sum(), x)
    before = saved_bytes(net, lambda: net.blocks[1](x))
    net.blocks[1].with_cp = True
    torch.testing.assert_close(torch.autograd.grad(net.blocks[1](x).sum(), x), expected)
    assert saved_bytes(net, lambda: net.blocks[1](x)) == features.nbytes < before


# Initialisers

class Initialised(Stage):
    """Initialises whatever it takes for weights, without asking."""

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                module.bias.data.fill_(7)
        self.apply(self.scale)

    @staticmethod
    def scale(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            module.weight.data.mul_(2)


@copies
@pytest.mark.parametrize('operator', ['FullBlock', 'SlimBlock'])
def test_init_weights_that_goes_through_all_modules_initialises_the_kept_blocks(copied, operator):
    torch.manual_seed(1)
    net = Initialised()
    replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2), operator=dict(type=operator)))
    net, state = copied(net), net.state_dict()
    own = {name: tensor.clone() for name, tensor in state.items() if name.startswith('blocks.1.')}
    net.init_weights()
    assert {name: tensor.tolist() for name, tensor in net.state_dict().items() if name in own} == {
        name: tensor.tolist() for name, tensor in own.items()}
    assert net.state_dict().keys() == state.keys()
    assert {float(bias) for block in net.blocks[::2] for bias in block.conv2.bias.detach()} == {7}
    if operator == 'FullBlock':
        assert net.blocks[1].conv1.weight is None
        plain = materialize(net)
        plain.init_weights()
        assert plain.blocks[1].conv1.bias.eq(7).all()


# Threads

class Slow(nn.Module):
    """Takes so long that another thread comes in the meantime."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.seconds = 0.

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        time.sleep(self.seconds)
        return self.conv2(x)


@copies
def test_threads_predict_with_one_model(features, copied):
    net = nn.Sequential(Slow(), Slow(), Slow())
    replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2)))
    net = copied(net).eval()
    expected, found = net(features), []
    net[1].seconds = 0.05

    @torch.no_grad()
    def predict() -> None:
        found.append(net(features))

    threads = [threading.Thread(target=predict) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(out, expected) for out in found)


# Modules that stand in several places

def test_a_block_that_stands_in_two_places_is_refused_and_its_neighbour_is_not(features):
    one = Gained()
    net = nn.Sequential(one, Gained(), one, Gained(), Gained())
    reason = 'can\'t be replaced: it also stands in another place of the model'
    with pytest.raises(ValueError, match=reason):
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'': [2]})))
    net[4].conv2 = net[3].conv2
    with pytest.raises(ValueError, match=reason.replace('it', 'its conv2', 1)):
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'': [3]})))
    replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2)))
    assert list(computing_layers(net)) == ['1']
    torch.testing.assert_close(net(features), materialize(net)(features))


# Other libraries' tools

def convolutions(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


def spectral_norms(net: nn.Module) -> None:
    for conv in convolutions(net):
        parametrizations.spectral_norm(conv)


def pruned(net: nn.Module) -> None:
    for conv in convolutions(net):
        prune.l1_unstructured(conv, 'weight', 0.5)


@pytest.mark.parametrize('use', [fuse_conv_bn, spectral_norms, pruned])
def test_what_changes_the_weights_of_all_blocks_says_what_to_do_first(replaced, use, image):
    net = replaced().eval()
    plain = materialize(net)
    with pytest.raises((RuntimeError, ValueError), match=r'materialize\(\) the model first'):
        use(net)
    use(plain)
    assert plain(image).isfinite().all()


def test_fuse_conv_bn_says_what_to_do_first_where_light_operators_run(replaced):
    with pytest.raises(RuntimeError, match='materialize'):
        fuse_conv_bn(replaced(operator=dict(type='SlimBlock')).eval())


def test_a_kept_block_that_has_lost_a_tensor_is_named(replaced, image):
    net = replaced().eval()
    net.layer2[1].norm1 = nn.Identity()
    with pytest.raises(RuntimeError, match='a kept Unit has lost its norm1.weight.*materialize'):
        net(image)


def test_kept_blocks_and_the_layers_own_parameters_can_be_reparametrized(replaced, image):
    net = replaced().eval()
    before = net(image)
    parametrizations.spectral_norm(net.layer2[1].conv1)
    parametrize.register_parametrization(net.layer2[2], 'coeff', nn.Softsign())
    out = net(image)
    assert not torch.allclose(out, before)
    torch.testing.assert_close(out, materialize(net)(image))


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(('operator', 'grad'), [('FullBlock', True), ('SlimBlock', False)])
def test_traces_equal_the_model(replaced, operator, grad, image):
    net = replaced(operator=dict(type=operator)).eval()
    with torch.set_grad_enabled(grad):
        expected = net(image)
        traced = torch.jit.trace(net, image)
        assert '_foreach' not in str(traced.inlined_graph)  # which ONNX doesn't know
        torch.testing.assert_close(traced(image), expected)
        torch.testing.assert_close(fx.symbolic_trace(net)(image), expected)


@pytest.mark.parametrize('operator', ['FullBlock', 'SlimBlock'])
def test_efficient_conv_bn_eval_equals_the_model(replaced, operator, image):
    net = replaced(operator=dict(type=operator)).eval()
    expected = net(image)
    turn_on_efficient_conv_bn_eval_for_single_model(net)
    torch.testing.assert_close(net(image), expected, rtol=1e-4, atol=1e-5)
