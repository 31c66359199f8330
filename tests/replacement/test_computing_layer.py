"""The computing layer: what it owns, whom it points to, and how it survives copies, casts and compilers."""
import copy
import pickle

import pytest
import torch
from mmengine.model import ExponentialMovingAverage, convert_sync_batchnorm, revert_sync_batchnorm
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from rl_mmdet.replacement import ComputingLayer, computing_layers, materialize, replace_blocks_

BLOCKS = {'layer1': [1], 'layer2': [2, 3]}


def pickled(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


both_duplicates = pytest.mark.parametrize('duplicate', [copy.deepcopy, pickled])


@pytest.fixture
def replaced(toy_net, randomise_):
    """A ToyNet with three replaced blocks, random weights and statistics."""
    def build(mode: str = 'detached') -> nn.Module:
        net = toy_net()
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks=BLOCKS), gradient=dict(mode=mode)))
        return randomise_(net)
    return build


def test_parameters_are_exactly_two_numbers_per_replaced_block(replaced):
    for layer in computing_layers(replaced()).values():
        assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {'coeff': (2,)}


def test_parameters_of_the_model_are_the_kept_ones_and_the_coefficients(toy_net, replaced):
    gone = tuple(f'{stage}.{index}.' for stage, indices in BLOCKS.items() for index in indices)
    kept = {name for name, _ in toy_net().named_parameters() if not name.startswith(gone)}
    assert {name for name, _ in replaced().named_parameters()} == kept | {f'{name}coeff' for name in gone}


def test_parameters_no_tensor_appears_under_two_names(replaced):
    storages = [tensor.data_ptr() for tensor in replaced().state_dict().values()]
    assert len(set(storages)) == len(storages)


def test_state_dict_keys_are_kept_tensors_all_buffers_and_coefficients(toy_net, replaced):
    baseline = toy_net()
    gone = tuple(f'{stage}.{index}.' for stage, indices in BLOCKS.items() for index in indices)
    parameters, buffers = dict(baseline.named_parameters()), dict(baseline.named_buffers())
    kept = {key for key in parameters if not key.startswith(gone)}
    assert set(replaced().state_dict()) == kept | set(buffers) | {f'{name}coeff' for name in gone}


def test_state_dict_coefficient_has_shape_two(replaced):
    shapes = [value.shape for key, value in replaced().state_dict().items() if key.endswith('coeff')]
    assert shapes == [(2,)] * 3


def test_state_dict_round_trip_restores_outputs(replaced, randomise_, image):
    source, target = replaced().eval(), randomise_(replaced(), seed=9).eval()
    assert not torch.allclose(source(image), target(image))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(image), target(image))


def test_neighbours_of_adjacent_replaced_blocks_are_the_nearest_kept(replaced):
    net = replaced()
    for index in (2, 3):
        layer = net.layer2[index]
        assert layer.before is net.layer2[1]
        assert layer.after is net.layer2[4]


def test_neighbours_are_no_children(replaced):
    net = replaced()
    assert [name for name, _ in net.layer2[2].named_children()] == ['conv1', 'norm1', 'conv2', 'norm2', 'act']


def test_synthesise_tensor_of_one_shape_equal_neighbour_is_that_one_scaled(replaced):
    layer = replaced().layer1[1]
    expected = layer.coeff[1] * layer.after.conv1.weight
    assert torch.equal(layer.synthesise()['conv1.weight'], expected)


def test_synthesise_tensor_of_two_neighbours_is_their_mix(replaced):
    layer = replaced().layer1[1]
    expected = layer.coeff[0] * layer.before.norm2.weight + layer.coeff[1] * layer.after.norm2.weight
    assert torch.equal(layer.synthesise()['norm2.weight'], expected)


def test_synthesise_names_and_shapes_are_the_removed_blocks(toy_net, replaced):
    expected = {name: p.shape for name, p in toy_net().layer2[2].named_parameters()}
    assert {name: tensor.shape for name, tensor in replaced().layer2[2].synthesise().items()} == expected


def test_buffers_are_the_removed_blocks_own(toy_net):
    net = toy_net()
    net.layer2[2].norm1.running_mean.fill_(7)
    replace_blocks_(net, dict(plan=dict(type='Blocks', blocks=BLOCKS)))
    assert net.layer2[2].norm1.running_mean.tolist() == [7] * 4


def test_buffers_move_in_train_mode(replaced, image):
    net = replaced().train()
    before = net.layer2[2].norm1.running_mean.clone()
    net(image)
    assert not torch.equal(net.layer2[2].norm1.running_mean, before)


def test_train_and_eval_reach_the_removed_blocks_norms(replaced):
    layer = replaced().layer2[2]
    for mode in (False, True):
        layer.train(mode)
        assert [layer.norm1.training, layer.training, layer.template.training] == [mode] * 3


def test_init_keeps_the_mode_of_every_module(toy_net):
    net = toy_net()
    net.layer2[2].norm1.eval()
    replace_blocks_(net, dict(plan=dict(type='Blocks', blocks=BLOCKS)))
    layer = net.layer2[2]
    assert [layer.training, layer.norm1.training, layer.norm2.training] == [True, False, True]


def test_init_norms_are_stale_because_the_weights_are_new(replaced):
    assert [layer.norm_stale for layer in computing_layers(replaced()).values()] == [True] * 3


def test_init_coefficients_take_the_models_dtype(toy_net):
    net = toy_net().double()
    replace_blocks_(net, dict(plan=dict(type='Blocks', blocks=BLOCKS)))
    assert net.layer2[2].coeff.dtype == torch.float64


def test_forward_passes_further_arguments_to_the_block():
    blocks = (nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0, batch_first=True) for _ in range(3))
    model = nn.ModuleDict({'blocks': nn.ModuleList(blocks)})
    replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2)))
    model.train()
    x, mask = torch.randn(1, 5, 4), torch.ones(5, 5).triu(1).bool()
    expected = materialize(model)['blocks'][1](x, src_mask=mask)
    torch.testing.assert_close(model['blocks'][1](x, src_mask=mask), expected)
    assert not torch.allclose(model['blocks'][1](x), expected)


class Shifted(nn.Linear):
    """A block with buffers of its own, as a Swin block's attention has; one of them isn't saved."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.more = nn.Linear(3, 3)
        self.register_buffer('shift', torch.randn(3))
        self.register_buffer('unsaved', torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(super().forward(x)) + self.shift * self.unsaved


@pytest.fixture
def shifted() -> nn.Module:
    chain = nn.Sequential(Shifted(), Shifted(), Shifted())
    replace_blocks_(chain, dict(plan=dict(type='EveryKth', k=2)))
    return chain


def test_direct_buffers_are_saved_if_they_were(shifted):
    assert list(shifted[1].state_dict()) == ['coeff', 'shift']


def test_direct_buffers_move_with_the_model(shifted):
    x = torch.randn(2, 3)
    expected = shifted(x)
    actual = shifted.double()(x.double())
    assert shifted[1].template.shift is shifted[1].shift
    torch.testing.assert_close(actual.float(), expected, rtol=1e-5, atol=1e-5)


def test_direct_buffers_loaded_are_used(shifted):
    x = torch.randn(2, 3)
    expected = shifted[1](x) + 2
    shifted[1].load_state_dict({'coeff': shifted[1].coeff, 'shift': shifted[1].shift + 2})
    torch.testing.assert_close(shifted[1](x), expected)


def test_direct_buffers_of_a_deepcopy_are_its_templates(shifted):
    twin = copy.deepcopy(shifted).double()
    assert twin[1].template.shift is twin[1].shift
    assert twin[1].shift is not shifted[1].shift


def test_to_dtype_casts_coefficients_and_buffers(replaced, image):
    net = replaced().double()
    assert {t.dtype for k, t in net.layer2[2].state_dict().items() if 'tracked' not in k} == {torch.float64}
    assert net(image.double()).dtype == torch.float64


def test_to_dtype_leaves_outputs_equal(replaced, image):
    net = replaced().eval()
    expected = net(image)
    torch.testing.assert_close(net.double()(image.double()).float(), expected, rtol=1e-5, atol=1e-5)


@both_duplicates
def test_duplicate_points_into_itself(replaced, duplicate):
    twin = duplicate(replaced())
    for index in (2, 3):
        assert twin.layer2[index].before is twin.layer2[1]
        assert twin.layer2[index].after is twin.layer2[4]


@both_duplicates
def test_duplicate_has_equal_outputs_and_keys(replaced, duplicate, image, assert_same_state):
    net = replaced().eval()
    twin = duplicate(net)
    assert torch.equal(twin(image), net(image))
    assert_same_state(twin.state_dict(), net.state_dict())


@both_duplicates
def test_duplicate_does_not_follow_the_originals_neighbours(replaced, duplicate, image):
    net = replaced().eval()
    twin = duplicate(net)
    expected = twin(image)
    with torch.no_grad():
        net.layer2[1].conv1.weight.mul_(-2)
        net.layer2[2].norm1.running_mean.add_(5)
    assert torch.equal(twin(image), expected)


@both_duplicates
def test_duplicate_follows_its_own_neighbours(replaced, duplicate):
    twin = duplicate(replaced().eval())
    features = torch.randn(1, 4, 4, 4)
    before = twin.layer2[2](features)
    with torch.no_grad():
        twin.layer2[1].conv1.weight.mul_(-2)
    assert not torch.allclose(twin.layer2[2](features), before)


@both_duplicates
def test_duplicate_buffers_stay_those_of_its_template(replaced, duplicate, image):
    twin = duplicate(replaced()).train()
    layer = twin.layer2[2]
    twin(image)
    assert layer.template.norm1 is layer.norm1


def test_ema_average_over_steps_equals_hand_computation(replaced):
    net = replaced()
    ema = ExponentialMovingAverage(net, momentum=0.25)
    expected = None
    for step in range(4):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * (step + 1))
        ema.update_parameters(net)
        now = {name: p.detach().clone() for name, p in net.named_parameters()}
        expected = now if expected is None else {n: 0.75 * expected[n] + 0.25 * now[n] for n in now}
    for name, parameter in ema.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)


def test_ema_computing_layers_use_the_averaged_neighbours(replaced):
    net = replaced()
    ema = ExponentialMovingAverage(net, momentum=0.25)
    ema.update_parameters(net)
    first = net.layer2[1].conv1.weight.detach().clone()
    with torch.no_grad():
        net.layer2[1].conv1.weight.add_(1)
    ema.update_parameters(net)
    layer = ema.module.layer2[2]
    averaged = 0.75 * first + 0.25 * (first + 1)
    expected = layer.coeff[0] * averaged + layer.coeff[1] * net.layer2[4].conv1.weight
    torch.testing.assert_close(layer.synthesise()['conv1.weight'], expected)


def test_ema_buffers_are_those_of_the_model(replaced, image):
    net = replaced().train()
    ema = ExponentialMovingAverage(net, momentum=0.25)
    net(image)
    ema.update_parameters(net)
    torch.testing.assert_close(ema.module.layer2[2].norm1.running_mean, net.layer2[2].norm1.running_mean)


def test_sync_batchnorm_conversion_reaches_the_computing_layer(replaced):
    net = nn.SyncBatchNorm.convert_sync_batchnorm(replaced())
    assert isinstance(net.layer2[2].norm1, nn.SyncBatchNorm)
    assert net.layer2[2].template.norm1 is net.layer2[2].norm1


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_sync_batchnorm_conversion_leaves_eval_outputs_equal(replaced, convert, image):
    net = replaced().eval()
    expected = net(image)
    torch.testing.assert_close(convert(net).eval()(image), expected)


@pytest.mark.parametrize('mode', [True, False], ids=['train', 'eval'])
def test_sync_batchnorm_revert_leaves_outputs_equal(replaced, mode, image):
    net = replaced().train(mode)
    expected = copy.deepcopy(net)(image)
    reverted = revert_sync_batchnorm(convert_sync_batchnorm(net)).train(mode)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in reverted.modules())
    torch.testing.assert_close(reverted(image), expected)


def test_sync_batchnorm_round_trip_has_the_same_state_dict(replaced, assert_same_state):
    net = replaced()
    expected = {key: value.clone() for key, value in net.state_dict().items()}
    assert_same_state(revert_sync_batchnorm(convert_sync_batchnorm(net)).state_dict(), expected)


def test_sync_batchnorm_round_trip_can_be_materialized(replaced, image):
    net = revert_sync_batchnorm(convert_sync_batchnorm(replaced())).eval()
    torch.testing.assert_close(materialize(net)(image), net(image))


@pytest.mark.parametrize('mode', ['detached', 'coupled'])
def test_autocast_outputs_are_near(replaced, mode, image):
    net = replaced(mode).eval()
    expected = net(image)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = net(image)
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('mode', ['detached', 'coupled'])
def test_autocast_equals_the_materialized_model(replaced, mode, image):
    net = replaced(mode).eval()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(net(image), materialize(net)(image))


@pytest.mark.parametrize('mode', ['detached', 'coupled'])
def test_autocast_gradients_are_float32_and_near(replaced, mode, image):
    nets = replaced(mode).eval(), replaced(mode).eval()
    nets[0](image).square().mean().backward()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = nets[1](image).square().mean()
    loss.backward()
    for name in ('layer2.2.coeff', 'layer2.1.conv1.weight'):
        expected, actual = (net.get_parameter(name).grad for net in nets)
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize('mode', ['detached', 'coupled'])
def test_compile_fullgraph_equals_eager(toy_net, randomise_, mode):
    nets, features = [], torch.randn(1, 4, 4, 4)
    for _ in range(2):
        net = toy_net().layer2[:3]
        replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2), gradient=dict(mode=mode)))
        nets.append(randomise_(net).eval())
    torch._dynamo.reset()
    outs = nets[0](features), torch.compile(nets[1], fullgraph=True, backend='aot_eager')(features)
    torch.testing.assert_close(outs[1], outs[0])
    for out in outs:
        out.square().mean().backward()
    for (name, eager), compiled in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, eager.grad, msg=name)


def test_functional_call_uses_the_given_neighbours(replaced, randomise_, image):
    net, other = replaced().eval(), randomise_(replaced(), seed=5).eval()
    given = {key: value.clone() for key, value in other.state_dict().items()}
    torch.testing.assert_close(functional_call(net, given, (image,)), other(image))


def test_checkpointed_from_outside_has_equal_gradients(replaced, image):
    nets = replaced('coupled').eval(), replaced('coupled').eval()
    nets[0](image).square().mean().backward()
    checkpoint(nets[1], image, use_reentrant=False).square().mean().backward()
    for (name, plain), again in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(again.grad, plain.grad, msg=name)


def test_to_block_restores_who_learns(toy_net):
    net = toy_net()
    net.layer2[2].norm1.requires_grad_(False)
    replace_blocks_(net, dict(plan=dict(type='Blocks', blocks=BLOCKS)))
    learns = {name: p.requires_grad for name, p in materialize(net).layer2[2].named_parameters()}
    assert {name for name, value in learns.items() if not value} == {'norm1.weight', 'norm1.bias'}


def test_repr_names_the_block_and_the_settings(replaced):
    text = repr(replaced().layer2[2])
    assert text.splitlines()[1] == (
        "  for=Unit, ScalarFusion(init=0.5, pretrained='average'), FullBlock(), Gradient(mode='detached')")


def test_computing_layer_forward_after_neighbour_step_uses_the_new_weights(replaced):
    layer = replaced().layer2[2].eval()
    assert isinstance(layer, ComputingLayer)
    features = torch.randn(1, 4, 4, 4)
    before = layer(features)
    optimizer = torch.optim.SGD(layer.after.parameters(), lr=1.0)
    layer.after(features).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(layer(features), before)


def reset_all_(net: nn.Module) -> None:
    for module in net.modules():
        if callable(getattr(module, 'reset_parameters', None)):
            module.reset_parameters()


def test_reset_parameters_passes_over_removed_ones(replaced):
    net = replaced()
    reset_all_(net)
    assert net.layer2[1].norm1.weight.eq(1).all()
    assert net.layer2[2].norm1.weight is None


def test_reset_parameters_works_again_in_the_materialized_model(replaced):
    plain = materialize(replaced())
    reset_all_(plain)
    assert plain.layer2[2].norm1.weight.eq(1).all()
    assert not plain.layer2[2].conv2.bias.eq(replaced().layer2[2].synthesise()['conv2.bias']).all()


def double_forward(self, x: Tensor) -> Tensor:
    return 2 * self.norm1(self.conv1(x))


@pytest.mark.parametrize('mode', ['detached', 'coupled'])
def test_other_forward_methods_of_the_block_run_on_the_fused_tensors(replaced, mode, monkeypatch):
    net, features = replaced(mode).eval(), torch.randn(2, 4, 4, 4)
    monkeypatch.setattr(type(net.layer2[1]), 'double_forward', double_forward, raising=False)
    out = net.layer2[2].double_forward(features)
    torch.testing.assert_close(out, materialize(net).layer2[2].double_forward(features))
    out.square().sum().backward()
    assert net.layer2[2].coeff.grad.abs().min() > 0
    assert (net.layer2[1].conv1.weight.grad is not None) == (mode == 'coupled')


def test_attributes_that_the_block_lacks_are_missing(replaced):
    with pytest.raises(AttributeError, match="'ComputingLayer' object has no attribute 'other_forward'"):
        _ = replaced().layer2[2].other_forward
