"""BatchNorm of replaced blocks: whose statistics are renewed, from what, and that nothing else moves."""
import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.replacement import computing_layers, recalibrate_norms_, replace_blocks_, stale_norms

NAMES = [f'layer2.{index}.{norm}' for index in (1, 3) for norm in ('norm1', 'norm2')]


@pytest.fixture
def stale(toy_net, randomise_):
    """A replaced ToyNet in the mode of norm_eval=True, whose two replaced blocks have new weights."""
    net = toy_net()
    replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'layer2': [1, 3]})))
    randomise_(net).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 3, 8, 8, generator=generator) * (1 + i) for i in range(3)]


def everything(net: nn.Module) -> tuple:
    """Tensors, modes and momenta."""
    return ({key: value.clone() for key, value in net.state_dict().items()},
            [(module.training, getattr(module, 'momentum', None)) for module in net.modules()])


def is_stale(net: nn.Module) -> list[bool]:
    return [layer.norm_stale for layer in computing_layers(net).values()]


def test_stale_norms_are_those_of_stale_layers_in_eval_mode_with_statistics(stale):
    assert [id(norm) for norm in stale_norms(stale)] == [id(stale.get_submodule(name)) for name in NAMES]
    stale.layer2[1].norm1.running_mean = None
    assert len(stale_norms(stale)) == 3
    stale.layer2[1].norm_stale = False
    assert len(stale_norms(stale)) == 2
    assert stale_norms(stale.train()) == []


def test_statistics_become_the_average_of_the_batches_statistics(stale, batches):
    inputs = {name: [] for name in NAMES}
    hooks = [stale.get_submodule(name).register_forward_pre_hook(
        lambda _, args, name=name: inputs[name].append(args[0].clone())) for name in NAMES]
    assert recalibrate_norms_(stale, batches, stale) == 4
    for hook in hooks:
        hook.remove()
    for name in NAMES:
        norm, flat = stale.get_submodule(name), [x.transpose(0, 1).flatten(1) for x in inputs[name]]
        assert len(flat) == len(batches)
        torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(1) for x in flat]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([x.var(1) for x in flat]).mean(0))


def test_the_first_norms_statistics_are_those_of_the_made_convolution(stale, batches):
    weight = stale.layer2[1].weights()['conv1.weight']
    with torch.no_grad():
        means = [nn.functional.conv2d(stale.layer2[0](stale.pool(stale.layer1(x))), weight, padding=1).mean((0, 2, 3))
                 for x in batches]
    recalibrate_norms_(stale, batches, stale)
    torch.testing.assert_close(stale.layer2[1].norm1.running_mean, torch.stack(means).mean(0), rtol=1e-5, atol=1e-6)


def test_nothing_else_moves(stale, batches):
    for momentum, norm in zip((0.01, 0.1, 0.2, 0.3), stale_norms(stale), strict=True):
        norm.momentum = momentum
    tensors, modes = everything(stale)
    gradients = []
    recalibrate_norms_(stale, batches, lambda x: gradients.append(stale(x).requires_grad))
    assert gradients == [False] * 3
    assert is_stale(stale) == [False, False]
    assert everything(stale)[1] == modes
    statistics = tuple(f'{name}.{kind}' for name in NAMES for kind in ('running', 'num'))
    for key, value in everything(stale)[0].items():
        assert torch.equal(value, tensors[key]) != key.startswith(statistics), key


def test_without_stale_norms_no_batch_is_read(stale, batches):
    def forbidden():
        raise AssertionError('a batch was read')
        yield

    recalibrate_norms_(stale, batches, stale)
    before = everything(stale)[0]
    assert recalibrate_norms_(stale, forbidden(), stale) == 0
    assert all(torch.equal(value, before[key]) for key, value in everything(stale)[0].items())


@pytest.mark.parametrize(('count', 'error', 'message'), [
    (0, ValueError, 'no batch to recalibrate BatchNorm statistics on'), (3, RuntimeError, 'the data loader died')])
def test_a_failure_leaves_all_as_it_was(stale, batches, assert_same_state, count, error, message):
    seen, before = [], everything(stale)

    def run(batch: Tensor) -> Tensor:
        seen.append(batch)
        if len(seen) == 2:  # the first has already moved the statistics
            raise RuntimeError('the data loader died')
        return stale(batch)

    with pytest.raises(error, match=message):
        recalibrate_norms_(stale, batches[:count], run)
    assert_same_state(everything(stale)[0], before[0])
    assert everything(stale)[1] == before[1]
    assert is_stale(stale) == [True, True]


def test_reduce_gets_every_statistic_once(stale, batches):
    norms, seen = stale_norms(stale), []
    recalibrate_norms_(stale, batches, stale, reduce=seen.append)
    assert sorted(map(id, seen)) == sorted(id(t) for norm in norms for t in (norm.running_mean, norm.running_var))
