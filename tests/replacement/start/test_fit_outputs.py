"""FitOutputs: computing layers fitted to the outputs of the blocks that they replace."""
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rl_mmdet.replacement import computing_layers, fit_outputs_, materialize, replace_blocks_
from rl_mmdet.replacement.saved_bytes import saved_bytes
from rl_mmdet.replacement.start import Fade, layers_to_fit

PLAN = dict(type='Blocks', blocks={'layer1': [1], 'layer2': [1, 3]})
NAMES = ['layer1.1', 'layer2.1', 'layer2.3']
FIT = dict(type='FitOutputs')
TRANSFORM = dict(type='TransformFusion', share=0.5)


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)]


@pytest.fixture
def trained(toy_net, randomise_) -> nn.Module:
    return randomise_(toy_net()).eval()


def replaced(net: nn.Module, **settings) -> nn.Module:
    net = copy.deepcopy(net)
    replace_blocks_(net, dict(dict(plan=PLAN, start=FIT), **settings))
    return net.eval()


def by_hand(net: nn.Module, original: nn.Module, name: str, batches: list[Tensor]) -> float:
    """What ``net`` leaves unexplained of a block's effect, from runs of both models."""
    seen, wanted = [], []
    hooks = [net.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append(out)),
             original.get_submodule(name).register_forward_hook(lambda _, args, out: wanted.append((args[0], out)))]
    with torch.no_grad():
        for batch in batches:
            net(batch), original(batch)
    for hook in hooks:
        hook.remove()
    difference = sum((out - target).square().sum() for out, (_, target) in zip(seen, wanted, strict=True))
    return (difference / sum((target - h).square().sum() for h, target in wanted)).sqrt().item()


@pytest.mark.parametrize('settings', [
    dict(fusion=TRANSFORM),
    dict(operator=dict(type='SlimBlock', width=1.), fusion=TRANSFORM),
    dict(operator=dict(type='SlimBlock', width=1.), gradient=dict(mode='coupled')),
], ids=['full', 'slim', 'coupled'])
def test_every_layer_comes_nearer_to_its_block_and_the_error_is_the_true_one(trained, batches, settings):
    net = replaced(trained, **settings)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = fit_outputs_(net, batches, steps=60)
    assert list(found) == NAMES
    own = {f'{name}.{key}' for name, layer in computing_layers(net).items() for key in layer.state_dict()}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items() if key not in own)
    for name, errors in found.items():
        assert errors.after < 0.99 * errors.before
        # statistics of single batches in the fit, of all batches afterwards
        assert errors.after == pytest.approx(by_hand(net, trained, name, batches), rel=0.1)
    assert not layers_to_fit(net)
    assert not any(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules() if isinstance(module, nn.Sequential))
    with torch.no_grad():
        torch.testing.assert_close(materialize(net)(batches[0]), net(batches[0]), rtol=1e-4, atol=1e-5)


def test_a_skipped_block_is_unexplained_and_later_layers_make_up_for_earlier_ones(trained, batches):
    errors = fit_outputs_(replaced(trained, operator=dict(type='Skip')), batches, steps=5)
    assert errors['layer1.1'] == (pytest.approx(1), pytest.approx(1))
    assert errors['layer2.3'].after == errors['layer2.3'].before != pytest.approx(1)


def test_every_run_of_a_block_has_its_own_target_where_a_batch_runs_it_more_than_once(trained, batches):
    def fitted(batch: list[Tensor]) -> dict[str, tuple[float, float]]:
        net = replaced(trained, operator=dict(type='SlimBlock', width=1., scale=0.1), fusion=TRANSFORM)
        return fit_outputs_(net, [batch], steps=60, run=lambda model, images: [model(each) for each in images])

    parts, whole = fitted(batches[:2]), fitted([torch.cat(batches[:2])])
    assert {name: error.before for name, error in parts.items()} == pytest.approx(
        {name: error.before for name, error in whole.items()})
    for found in (parts, fitted([batches[0], batches[1][..., :6]])):
        assert all(error.after < error.before for error in found.values())


def test_a_baselines_checkpoint_is_what_the_fit_aims_at(trained, toy_net, batches):
    net = toy_net().eval()
    replace_blocks_(net, dict(plan=PLAN, start=FIT, fusion=TRANSFORM))
    assert not any(layer.fit_wanted for layer in computing_layers(net).values())
    net.load_state_dict(trained.state_dict())
    assert all(layer.fit_wanted for layer in computing_layers(net).values())
    expected = replaced(trained, fusion=TRANSFORM)
    expected.load_state_dict(trained.state_dict())
    assert fit_outputs_(net, batches, steps=5) == fit_outputs_(expected, batches, steps=5)
    net.load_state_dict(expected.state_dict())
    assert not any(layer.fit_wanted for layer in computing_layers(net).values())


def test_a_fit_that_makes_it_worse_is_undone(trained, batches):
    net = replaced(trained, fusion=TRANSFORM)
    before = copy.deepcopy({name: dict(layer.named_parameters()) for name, layer in computing_layers(net).items()})
    found = fit_outputs_(net, batches, steps=3, lr=1e3)
    for name, layer in computing_layers(net).items():
        assert found[name].before == found[name].after
        assert all(torch.equal(value, before[name][key]) for key, value in layer.named_parameters())


def test_processes_average_their_gradients(trained, batches):
    """Two processes with the same batches do what one does: their mean is each one's own."""
    one, both, reduced = replaced(trained, fusion=TRANSFORM), replaced(trained, fusion=TRANSFORM), []
    fit_outputs_(one, batches, steps=4)
    fit_outputs_(both, batches, steps=4, reduce=reduced.append)
    assert all(torch.equal(value, both.state_dict()[key]) for key, value in one.state_dict().items())
    parameters = [value for layer in computing_layers(both).values() for value in layer.parameters()]
    assert [value.shape for value in parameters] == [value.shape for value in reduced[3:3 + len(parameters)]]


def test_what_is_kept_of_the_removed_blocks_is_no_part_of_the_model(trained):
    net, plain = replaced(trained), replaced(trained, start=None)
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert len(list(net.parameters())) == len(list(plain.parameters()))
    assert list(layers_to_fit(copy.deepcopy(net))) == NAMES


def test_a_fade_goes_from_the_block_to_the_layer(trained, batches):
    """In training; in eval mode the layer is alone all the time."""
    net = replaced(trained).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    fades = [Fade(layer) for layer in computing_layers(net).values()]
    alone = replaced(trained)
    torch.testing.assert_close(net(batches[0]), trained(batches[0]))
    for fade in fades:
        fade.set_(0.5)
    x = torch.randn(2, 3, 4, 4)
    layer, block = alone.layer1[1], trained.layer1[1]
    h = trained.layer1[0](x)
    torch.testing.assert_close(net.layer1[1](h), (layer(h) + block(h)) / 2)
    torch.testing.assert_close(net.eval()(batches[0]), alone(batches[0]))
    net.train()
    for fade in fades:
        fade.set_(1)
    assert not layers_to_fit(net)
    assert not any(layer._forward_hooks for layer in computing_layers(net).values())


def run(how: str, net: nn.Module, x: Tensor) -> Tensor:
    """A training step's forward pass."""
    if how == 'autocast':
        with torch.autocast('cpu', torch.bfloat16):
            return net(x).float()
    if how == 'compiled':
        return torch.compile(net, backend='aot_eager')(x)
    return checkpoint(net, x, use_reentrant=False) if how == 'checkpointed' else net(x)


@pytest.mark.parametrize(('how', 'error'), [('autocast', .1), ('compiled', 1e-5), ('checkpointed', 1e-5)])
def test_a_fade_is_the_same_under(trained, batches, how, error):
    results = []
    for each in ('plain', how):
        net = replaced(trained, fusion=TRANSFORM, gradient=dict(every=1)).train()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        fades = [Fade(layer) for layer in computing_layers(net).values()]
        for alpha in (0.25, 0.75):  # what is compiled once follows it
            for fade in fades:
                fade.set_(alpha)
            out = run(each, net, batches[0])
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad for layer in computing_layers(net).values()
                                        for p in layer.own_parameters().values())])
    for plain, other in zip(*results, strict=True):
        assert float((other - plain).norm()) <= error * float(plain.norm())


def test_a_fade_keeps_little_more_than_the_layer_alone(trained, batches):
    net = replaced(trained, operator=dict(type='SlimBlock', width=0.25)).train()
    fades = [Fade(layer) for layer in computing_layers(net).values()]
    during = saved_bytes(net, lambda: net(batches[0]), [fade.block for fade in fades])
    for fade in fades:
        fade.set_(1)
    assert during < 1.1 * saved_bytes(net, lambda: net(batches[0]))


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(start=dict(type='FitOutputs', fade=-1)), 'fade must be an integer of at least 0, got -1'),
    (dict(start=dict(type='FitOutputs', batches=0)), 'replacement.start: FitOutputs: batches must be an integer of at '
                                                     'least 1, got 0'),
    (dict(start=dict(type='FitOutputs', steps=0)), 'steps must be an integer of at least 1, got 0'),
    (dict(start=dict(type='FitOutputs', lr=0)), 'lr must be a number above 0, got 0'),
    (dict(start=dict(type='Fit')), "unknown type 'Fit'; allowed: Average, FitOutputs$"),
    (dict(fusion=dict(type='OwnWeights')), 'OwnWeights has none; leave start out'),
    (dict(fusion=dict(type='ScalarFusion', pretrained='average')), "ScalarFusion has no argument 'pretrained'"),
])
def test_wrong_settings_raise(trained, settings, message):
    with pytest.raises(ValueError, match=message):
        replaced(trained, **settings)


def test_no_batch_raises(trained):
    with pytest.raises(ValueError, match='no batch to fit to'):
        fit_outputs_(replaced(trained), [])
