"""BatchNorm of replaced blocks: whose statistics are renewed, from what, and that nothing else moves."""
import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.replacement import computing_layers, recalibrate_norms_, replace_blocks_, stale_norms

STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


@pytest.fixture
def stale(toy_net, randomise_):
    """A replaced ToyNet in the mode of norm_eval=True, whose two replaced blocks have new weights."""
    net = toy_net()
    replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'layer2': [1, 3]})))
    randomise_(net).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for layer in computing_layers(net).values():
        layer.norm_stale = True
    return net


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 3, 8, 8, generator=generator) * (1 + i) for i in range(3)]


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers() if name.endswith(STATISTICS)}


def test_stale_norms_are_those_of_stale_layers_in_eval_mode(stale):
    expected = [stale.layer2[i].get_submodule(name) for i in (1, 3) for name in ('norm1', 'norm2')]
    actual = stale_norms(stale)
    assert len(actual) == 4
    assert all(a is b for a, b in zip(actual, expected, strict=True))


def test_stale_norms_in_train_mode_are_left_out(stale):
    assert stale_norms(stale.train()) == []


def test_stale_norms_without_statistics_are_left_out(stale):
    stale.layer2[1].norm1.running_mean = None
    assert len(stale_norms(stale)) == 3


def test_stale_norms_of_layers_that_are_not_stale_are_left_out(stale):
    stale.layer2[1].norm_stale = False
    assert len(stale_norms(stale)) == 2


@pytest.mark.parametrize('name', ['layer2.1.norm1', 'layer2.1.norm2', 'layer2.3.norm1', 'layer2.3.norm2'])
def test_recalibrate_statistics_are_the_average_of_batch_statistics(stale, batches, name):
    inputs = []
    norm = stale.get_submodule(name)
    handle = norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    recalibrate_norms_(stale, batches, stale)
    handle.remove()
    assert len(inputs) == len(batches)
    flat = [x.transpose(0, 1).flatten(1) for x in inputs]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(1) for x in flat]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(1) for x in flat]).mean(0))


def test_recalibrate_first_norm_equals_hand_computation_from_the_features(stale, batches):
    layer = stale.layer2[1]
    weight = layer.synthesise()['conv1.weight']
    with torch.no_grad():
        inputs = [nn.functional.conv2d(stale.layer2[0](stale.pool(stale.layer1(x))), weight, padding=1)
                  for x in batches]
    recalibrate_norms_(stale, batches, stale)
    expected = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(layer.norm1.running_mean, expected, rtol=1e-5, atol=1e-6)


def test_recalibrate_returns_the_number_of_norms(stale, batches):
    assert recalibrate_norms_(stale, batches, stale) == 4


def test_recalibrate_other_norms_are_untouched(stale, batches):
    before = statistics(stale)
    recalibrate_norms_(stale, batches, stale)
    for name, value in statistics(stale).items():
        if not name.startswith(('layer2.1.', 'layer2.3.')):
            assert torch.equal(value, before[name]), name


def test_recalibrate_parameters_are_untouched(stale, batches):
    before = {name: p.detach().clone() for name, p in stale.named_parameters()}
    recalibrate_norms_(stale, batches, stale)
    assert all(torch.equal(p, before[name]) for name, p in stale.named_parameters())


def test_recalibrate_restores_the_modes(stale, batches):
    before = [module.training for module in stale.modules()]
    recalibrate_norms_(stale, batches, stale)
    assert [module.training for module in stale.modules()] == before


def test_recalibrate_restores_the_momentum(stale, batches):
    for momentum, norm in zip((0.01, 0.1, 0.2, 0.3), stale_norms(stale), strict=True):
        norm.momentum = momentum
    recalibrate_norms_(stale, batches, stale)
    assert [stale.layer2[i].get_submodule(n).momentum for i in (1, 3) for n in ('norm1', 'norm2')] == [
        0.01, 0.1, 0.2, 0.3]


def test_recalibrate_leaves_no_layer_stale(stale, batches):
    recalibrate_norms_(stale, batches, stale)
    assert [layer.norm_stale for layer in computing_layers(stale).values()] == [False, False]


def test_recalibrate_a_second_time_does_nothing(stale, batches):
    recalibrate_norms_(stale, batches, stale)
    before = statistics(stale)
    assert recalibrate_norms_(stale, batches, stale) == 0
    assert all(torch.equal(value, before[name]) for name, value in statistics(stale).items())


def test_recalibrate_takes_no_gradient(stale, batches):
    modes = []
    recalibrate_norms_(stale, batches, lambda x: modes.append(stale(x).requires_grad))
    assert modes == [False] * 3


def test_recalibrate_not_stale_reads_no_batch(stale):
    def forbidden():
        raise AssertionError('a batch was read')
        yield

    for layer in computing_layers(stale).values():
        layer.norm_stale = False
    assert recalibrate_norms_(stale, forbidden(), stale) == 0


def test_recalibrate_no_batch_raises(stale):
    with pytest.raises(ValueError, match='no batch to recalibrate BatchNorm statistics on'):
        recalibrate_norms_(stale, [], stale)


def broken_run(stale: nn.Module, batches: list[Tensor]) -> None:
    """Fails on the second batch, when the first has already moved the statistics."""
    seen = []

    def run(batch: Tensor) -> Tensor:
        seen.append(batch)
        if len(seen) == 2:
            raise RuntimeError('the data loader died')
        return stale(batch)

    with pytest.raises(RuntimeError, match='the data loader died'):
        recalibrate_norms_(stale, batches, run)


def no_batch(stale: nn.Module, batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match='no batch'):
        recalibrate_norms_(stale, [], stale)


@pytest.mark.parametrize('fail', [broken_run, no_batch])
def test_recalibrate_failure_restores_the_old_statistics(stale, batches, fail):
    before = statistics(stale)
    fail(stale, batches)
    for name, value in statistics(stale).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize('fail', [broken_run, no_batch])
def test_recalibrate_failure_restores_modes_and_momentum(stale, batches, fail):
    before = [(module.training, getattr(module, 'momentum', None)) for module in stale.modules()]
    fail(stale, batches)
    assert [(module.training, getattr(module, 'momentum', None)) for module in stale.modules()] == before


@pytest.mark.parametrize('fail', [broken_run, no_batch])
def test_recalibrate_failure_leaves_the_layers_stale(stale, batches, fail):
    fail(stale, batches)
    assert [layer.norm_stale for layer in computing_layers(stale).values()] == [True, True]


def test_recalibrate_reduce_gets_every_statistic_once(stale, batches):
    norms, seen = stale_norms(stale), []
    recalibrate_norms_(stale, batches, stale, reduce=seen.append)
    assert {tensor.data_ptr() for tensor in seen} == {
        t.data_ptr() for norm in norms for t in (norm.running_mean, norm.running_var)}
    assert len(seen) == 8


def test_recalibrate_eval_output_of_the_layer_becomes_normalised(stale, batches):
    recalibrate_norms_(stale, batches[:1], stale)
    inputs = []
    handle = stale.layer2[1].norm1.register_forward_hook(lambda _, args, out: inputs.append(out.detach()))
    stale(batches[0])
    handle.remove()
    bias = stale.layer2[1].synthesise()['norm1.bias'].detach()
    torch.testing.assert_close(inputs[0].mean((0, 2, 3)), bias, rtol=1e-4, atol=1e-5)
