"""The computing layer: what it owns, whom it points to, and how it survives copies, casts and other libraries."""
import copy
import pickle

import pytest
import torch
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from torch import Tensor, nn
from torch.func import functional_call

from rl_mmdet.replacement import computing_layers, materialize, replace_blocks_

REPLACED = ('layer1.1.', 'layer2.2.', 'layer2.3.')
duplicates = pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
                                     ids=['deepcopy', 'pickle'])
modes = pytest.mark.parametrize('mode', ['detached', 'coupled'])


# What it owns

def test_state_is_the_kept_tensors_all_buffers_and_the_coefficients(toy_net, replaced):
    baseline, net = toy_net(), replaced()
    kept = {name for name, _ in baseline.named_parameters() if not name.startswith(REPLACED)}
    learned = kept | {f'{name}coeff' for name in REPLACED}
    assert {name for name, _ in net.named_parameters()} == learned
    assert set(net.state_dict()) == learned | {name for name, _ in baseline.named_buffers()}
    storages = [tensor.data_ptr() for tensor in net.state_dict().values()]
    assert len(set(storages)) == len(storages)
    assert [name for name, _ in net.layer2[2].named_children()] == ['conv1', 'norm1', 'conv2', 'norm2', 'act']


def test_buffers_are_the_removed_blocks_own_and_move_in_training(toy_net, image):
    net = toy_net()
    net.layer2[2].norm1.running_mean.fill_(7)
    replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'layer2': [2]})))
    assert net.layer2[2].norm1.running_mean.tolist() == [7] * 4
    net.eval()(image)
    assert net.layer2[2].norm1.running_mean.tolist() == [7] * 4
    net.train()(image)
    assert net.layer2[2].norm1.running_mean.tolist() != [7] * 4


def test_modes_stay_and_follow(toy_net):
    net = toy_net()
    net.layer2[2].norm1.eval()
    replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'layer2': [2]})))
    layer = net.layer2[2]
    assert [layer.training, layer.norm1.training, layer.norm2.training] == [True, False, True]
    for mode in (True, False):
        net.train(mode)
        assert {module.training for module in [layer.template, *layer.modules()]} == {mode}


class Shifted(nn.Linear):
    """A block with buffers of its own, as a Swin block's attention has; one of them isn't saved."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.more = nn.Linear(3, 3)
        self.register_buffer('shift', torch.randn(3))
        self.register_buffer('unsaved', torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(super().forward(x)) + self.shift * self.unsaved


@pytest.mark.parametrize('copied', [lambda net: net, copy.deepcopy])
def test_buffers_of_the_block_itself_are_saved_moved_and_loaded(copied):
    net = nn.Sequential(Shifted(), Shifted(), Shifted())
    replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2)))
    x, net = torch.randn(2, 3), copied(net)
    assert list(net[1].state_dict()) == ['coeff', 'shift']
    expected = net(x)
    torch.testing.assert_close(net.double()(x.double()).float(), expected, rtol=1e-5, atol=1e-5)
    expected = net[1](x.double()) + 2
    net[1].load_state_dict({'coeff': net[1].coeff, 'shift': net[1].shift + 2})
    torch.testing.assert_close(net[1](x.double()), expected)


# What it computes

def test_weights_are_the_mixtures_of_the_neighbours(toy_net, replaced):
    layer, names = replaced().layer1[1], [name for name, _ in toy_net().layer1[1].named_parameters()]
    (before, after), made = layer.kept, layer.weights()
    assert list(made) == names
    for name in names:
        one, other = before.get_parameter(name), after.get_parameter(name)
        own = layer.coeff[1] * other
        assert torch.equal(made[name], layer.coeff[0] * one + own if one.shape == other.shape else own), name


def test_neighbours_of_adjacent_replaced_blocks_are_the_nearest_kept(replaced):
    net = replaced()
    assert net.layer2[2].kept == net.layer2[3].kept == (net.layer2[1], net.layer2[4])


def test_forward_follows_the_neighbours_training(replaced):
    layer, x = replaced().layer2[2].eval(), torch.randn(1, 4, 4, 4)
    before = layer(x)
    optimizer = torch.optim.SGD(layer.kept[1].parameters(), lr=1.0)
    layer.kept[1](x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(layer(x), before)


def test_forward_passes_further_arguments_to_the_block():
    blocks = (nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0, batch_first=True) for _ in range(3))
    model = nn.ModuleDict({'blocks': nn.ModuleList(blocks)})
    replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2)))
    x, mask = torch.randn(1, 5, 4), torch.ones(5, 5).triu(1).bool()
    expected = materialize(model)['blocks'][1](x, src_mask=mask)
    torch.testing.assert_close(model['blocks'][1](x, src_mask=mask), expected)
    assert not torch.allclose(model['blocks'][1](x), expected)


def double_forward(self, x: Tensor) -> Tensor:
    return 2 * self.norm1(self.conv1(x))


@modes
def test_other_ways_forward_run_on_the_fused_tensors(replaced, mode, monkeypatch):
    net, x = replaced(gradient=dict(mode=mode, every=1)).eval(), torch.randn(2, 4, 4, 4)
    monkeypatch.setattr(type(net.layer2[1]), 'double_forward', double_forward, raising=False)
    out = net.layer2[2].double_forward(x)
    torch.testing.assert_close(out, materialize(net).layer2[2].double_forward(x))
    out.square().sum().backward()
    assert net.layer2[2].coeff.grad.abs().min() > 0
    assert (net.layer2[1].conv1.weight.grad is not None) == (mode == 'coupled')
    with pytest.raises(AttributeError, match="'ComputingLayer' object has no attribute 'other_forward'"):
        _ = net.layer2[2].other_forward


def test_functional_call_uses_the_given_neighbours(replaced, randomise_, image):
    net, other = replaced().eval(), randomise_(replaced(), seed=5).eval()
    given = {key: value.clone() for key, value in other.state_dict().items()}
    torch.testing.assert_close(functional_call(net, given, (image,)), other(image))


# Casts and copies

def test_cast_leaves_outputs_equal(replaced, image):
    net = replaced().eval()
    expected = net(image)
    actual = net.double()(image.double())
    assert {t.dtype for k, t in net.layer2[2].state_dict().items() if 'tracked' not in k} == {torch.float64}
    torch.testing.assert_close(actual.float(), expected, rtol=1e-5, atol=1e-5)


@duplicates
def test_a_copy_has_equal_outputs_and_a_life_of_its_own(replaced, duplicate, image, assert_same_state):
    net = replaced().eval()
    twin = duplicate(net)
    assert_same_state(twin.state_dict(), net.state_dict())
    assert torch.equal(twin(image), expected := net(image))
    assert twin.layer2[2].kept == (twin.layer2[1], twin.layer2[4])
    with torch.no_grad():
        net.layer2[1].conv1.weight.mul_(-2)
        net.layer2[2].norm1.running_mean.add_(5)
        assert torch.equal(twin(image), expected)
        twin.layer2[1].conv1.weight.mul_(-2)
        twin.layer2[2].norm1.running_mean.add_(5)
    assert torch.equal(twin(image), net(image))
    for each in (net, twin):
        each.train()(image)
    assert_same_state(twin.state_dict(), net.state_dict())


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_sync_batchnorm_there_and_back(replaced, convert, image, assert_same_state):
    net = replaced().eval()
    state, expected = copy.deepcopy(net.state_dict()), net(image)
    net = convert(net)
    assert isinstance(net.layer2[2].norm1, nn.SyncBatchNorm)
    torch.testing.assert_close(net.eval()(image), expected)
    net = revert_sync_batchnorm(net).eval()
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in net.modules())
    assert_same_state(net.state_dict(), state)
    torch.testing.assert_close(net(image), expected)
    torch.testing.assert_close(materialize(net)(image), expected)


def reset_all_(net: nn.Module) -> None:
    for module in net.modules():
        if callable(getattr(module, 'reset_parameters', None)):
            module.reset_parameters()


def test_initialisers_pass_over_removed_weights_until_they_are_there_again(replaced):
    net = replaced()
    plain = materialize(net)
    made = plain.layer2[2].conv2.bias.detach().clone()
    for each in (net, plain):
        reset_all_(each)
        assert each.layer2[1].norm1.weight.eq(1).all()
    assert net.layer2[2].norm1.weight is None
    assert plain.layer2[2].norm1.weight.eq(1).all()
    assert not plain.layer2[2].conv2.bias.eq(made).all()


def test_repr_names_the_block_and_the_settings(replaced):
    assert repr(replaced().layer2[2]).splitlines()[1] == (
        "  for=Unit, ScalarFusion(init=0.5), FullBlock(), Gradient(mode='detached', every=8)")


def test_norms_are_stale_because_the_weights_are_new(replaced):
    assert {layer.norm_stale for layer in computing_layers(replaced()).values()} == {True}
