"""The search space: what is open, what loads into it, and how the search ends in the ordinary replaced model."""
import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from rl_mmdet.replacement import computing_layers, materialize, replace_blocks_, stale_norms
from rl_mmdet.replacement.saved_bytes import saved_bytes
from rl_mmdet.search.search_space import finish_search_

LEARNED = dict(type='LearnedPlan', budget=dict(params=0.99))
OPEN = ['layer1.1', 'layer2.1', 'layer2.2', 'layer2.3', 'layer2.4']
CHOICE = {'layer1': [1], 'layer2': [2, 3]}


@pytest.fixture
def toy(toy_net, randomise_) -> Callable[..., nn.Module]:
    """A ToyNet with random weights in which a plan is learned, or this choice is replaced."""
    def build(choice: dict[str, list[int]] | None = None, **settings: Any) -> nn.Module:
        net = toy_net()
        plan = LEARNED if choice is None else dict(type='Blocks', blocks=choice)
        net.report = replace_blocks_(net, dict(dict(gradient=dict(every=1)), **settings, plan=plan))
        return randomise_(net)
    return build


@pytest.fixture
def baseline(toy_net, randomise_) -> dict[str, Tensor]:
    return randomise_(toy_net(), seed=2).state_dict()


# What is open

def test_report_says_what_is_open_and_why_others_are_not(toy, toy_net):
    report = toy().report
    assert [row.name for row in report.rows if row.open] == OPEN
    assert not report.replaced
    text = str(report)
    assert text.startswith('5 of 9 blocks may be replaced; the search decides')
    assert '  layer2.2 (Unit): open' in text
    assert "  layer1.0 (Unit): kept, can't be replaced: no kept block before it in its stage" in text
    assert report.settings['plan'].startswith('LearnedPlan(')
    net = toy_net()
    net.layer1.requires_grad_(False)
    report = replace_blocks_(net, dict(plan=LEARNED))
    assert [row.name for row in report.rows if row.open] == OPEN[1:]


def test_the_model_keeps_its_modules_and_parameters_and_only_gains_those_beside(toy_net):
    net, plain = toy_net(), toy_net()
    before = dict(net.named_parameters())
    replace_blocks_(net, dict(plan=LEARNED))
    after = dict(net.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {f'{name}.replaced.coeff' for name in OPEN}
    assert [key for key in net.state_dict() if '.replaced.' not in key] == list(plain.state_dict())
    for name in OPEN:
        assert isinstance(net.get_submodule(name), type(plain.get_submodule(name)))


def test_fits_where_first_and_last_blocks_are_open_too(toy, toy_net):
    """With ``adapt`` each of them can be replaced, and not all at once: the weights must come from somewhere."""
    net = nn.Sequential(nn.Sequential(*list(toy_net().layer2)[:3]))
    replace_blocks_(net, dict(plan=LEARNED, fusion=dict(adapt=True)))
    space = net.search_space
    assert [space.fits([True] * 3), space.fits([True, True, False]), space.fits([False] * 3)] == [False, True, True]
    assert toy().search_space.fits([True] * 5)


def test_what_is_searched_is_neither_searched_again_nor_materialized(toy, snapshot):
    net = toy()
    before = snapshot(net)
    with pytest.raises(ValueError, match='replacement: a plan is being learned for this model already'):
        replace_blocks_(net, dict(plan=LEARNED))
    for module in (net, net.layer2):
        with pytest.raises(ValueError, match="a plan is still being learned for this model, so it isn't known which "
                                             'blocks are replaced; finish the search first'):
            materialize(module)
    assert snapshot(net)[0] == before[0]


# Loading

def test_a_baseline_starts_each_layer_as_if_it_alone_was_replaced(toy, baseline):
    net = toy()
    for layer in computing_layers(net).values():
        layer.norm_stale = False
    result = net.load_state_dict(baseline, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    found = net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in baseline.items())
    assert len(stale_norms(net.eval())) == 10
    for name in OPEN:
        alone = toy({name[:6]: [int(name[-1])]})
        alone.load_state_dict(baseline)
        for key, value in alone.state_dict().items():
            assert torch.equal(found[key.replace(f'{name}.', f'{name}.replaced.')], value), key


def test_a_baseline_loads_through_mmengine_with_a_prefix(toy, baseline, tmp_path, assert_same_state):
    expected = toy()
    expected.load_state_dict(baseline)
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in baseline.items()}), tmp_path / 'b.pth')
    whole = nn.Module()
    whole.backbone = toy()
    load_checkpoint(whole, str(tmp_path / 'b.pth'))
    assert_same_state(whole.backbone.state_dict(), expected.state_dict())


def test_its_own_state_is_taken_as_it_is(toy, randomise_, assert_same_state, caplog):
    net, other = toy(), randomise_(toy(), seed=5)
    with caplog.at_level(logging.INFO, 'rl_mmdet'):
        other.load_state_dict(net.state_dict())
    assert not caplog.records
    assert_same_state(other.state_dict(), net.state_dict())
    assert not any(layer.norm_stale for layer in computing_layers(other).values())


@pytest.mark.parametrize('operator', ['FullBlock', 'SlimBlock', 'Skip'])
def test_weights_of_a_plan_that_was_found_are_refused(toy, tmp_path, operator):
    """MMEngine would only log which keys are missing, and leave the replaced blocks random."""
    saved = toy(CHOICE, operator=dict(type=operator)).state_dict()
    torch.save({f'backbone.{key}': value for key, value in saved.items()}, tmp_path / 'found.pth')
    whole = nn.Module()
    whole.backbone = toy(operator=dict(type=operator))
    with pytest.raises(ValueError, match=r'none for layer1.1, layer2.2, layer2.3, as after a search.*_found\.py'):
        load_checkpoint(whole, str(tmp_path / 'found.pth'))


@pytest.mark.slow
def test_a_baseline_whose_convolutions_make_buffers_as_they_load(randomise_):
    """DetectoRS' do, of their weights."""
    def build(plan: dict | None) -> nn.Module:
        torch.manual_seed(0)
        return MODELS.build(dict(
            type='RLBackbone', backbone='DetectoRS_ResNet', depth=50, base_channels=4, conv_cfg=dict(type='ConvAWS'),
            sac=dict(type='SAC', use_deform=False), stage_with_sac=(False, True, True, False),
            replacement=plan and dict(plan=plan)))

    state = {key: value for key, value in randomise_(build(None)).state_dict().items() if 'weight_' not in key}
    net, alone = build(LEARNED), build(dict(type='Blocks', blocks={'layer3': [2]}))
    for model in (net, alone):
        model.load_state_dict(state, strict=False)
    for key, value in alone.state_dict().items():
        if key.startswith('layer3.2.'):
            assert torch.equal(net.state_dict()[key.replace('layer3.2.', 'layer3.2.replaced.')], value), key


# Blocks of which some submodules are replaced

def test_a_block_shares_its_own_tensors_with_the_layer_beside_it(toy, toy_net, image, randomise_, assert_same_state):
    net, other = (randomise_(toy(operator=dict(type='FullBlock', only='conv2')), seed=seed) for seed in (1, 2))
    plain = toy_net()
    assert {name for name, _ in net.named_parameters()} == {
        *(name for name, _ in plain.named_parameters()), *(f'{name}.replaced.coeff' for name in OPEN)}
    assert {key.rpartition('.')[2] for key in net.state_dict().keys() - plain.state_dict().keys()} == {
        'coeff', 'running_mean', 'running_var', 'num_batches_tracked'}
    other.load_state_dict(net.state_dict())
    assert_same_state(other.state_dict(), net.state_dict())
    other.load_state_dict(randomise_(plain, seed=3).state_dict())
    assert torch.equal(other.layer2[2].replaced.conv1.weight, plain.layer2[2].conv1.weight)
    net.search_space.set_gates([True, False, True, True, False])
    objects = {name: parameter for name, parameter in net.named_parameters() if not name.endswith('coeff')}
    searching = net(image)
    net.zero_grad()
    searching.square().sum().backward()
    searched = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    finish_search_(net, CHOICE)
    assert set(net.state_dict()) == set(toy(CHOICE, operator=dict(type='FullBlock', only='conv2')).state_dict())
    assert all(parameter is objects[name] for name, parameter in net.named_parameters() if not name.endswith('coeff'))
    net.zero_grad()
    out = net(image)
    torch.testing.assert_close(out, searching)
    out.square().sum().backward()
    for name, parameter in net.named_parameters():
        key = name.replace('.coeff', '.replaced.coeff')
        torch.testing.assert_close(parameter.grad, searched[key], msg=name)


# The end of the search

def test_finish_is_the_ordinary_replaced_model_with_the_same_tensors(case, randomise_, as_replaced, step, assert_close,
                                                                     assert_same_state, picture):
    model, expected = randomise_(case.search()), case.replaced()
    expected.load_state_dict(as_replaced(model, model.state_dict(), case.choice))
    objects = as_replaced(model, {name: torch.tensor(id(p)) for name, p in model.named_parameters()}, case.choice)
    model.train(), expected.train()
    model.search_space.set_gates([index % 2 == 0 for index, _ in enumerate(model.search_space.places)])
    report = finish_search_(model, case.choice)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in expected.named_modules()]
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, int(i)) for name, i in objects.items()]
    assert_same_state(model.state_dict(), expected.state_dict())
    assert_close(step(model, picture), step(expected, picture))
    assert report.rows == expected.replacement_report.rows


def test_finish_with_nothing_replaced_is_the_baseline(toy, toy_net, as_replaced, assert_same_state, image):
    net, plain = toy().eval(), toy_net().eval()
    plain.load_state_dict(as_replaced(net, net.state_dict(), {}))
    assert not finish_search_(net, {}).replaced
    assert_same_state(net.state_dict(), plain.state_dict())
    assert torch.equal(net(image), plain(image))


def test_finish_report_shows_the_choice_as_a_plan(toy):
    text = str(finish_search_(toy(), {'layer2': (3, 2), 'layer1': [1]}))
    assert text.startswith('3 of 9 blocks replaced by computing layers: ')
    assert f"the same choice as a plan: dict(type='Blocks', blocks={CHOICE})" in text
    assert '  layer2.2 (Unit): replaced, from layer2.1 and layer2.4; learns 2' in text
    assert '  layer2.1 (Unit): kept\n' in text


def test_finish_of_a_copy_leaves_the_model_searching(toy, image):
    net = toy().eval()
    twin = copy.deepcopy(net)
    finish_search_(twin, CHOICE)
    net.search_space.set_gates([True, False, True, True, False])
    assert torch.equal(net(image), twin(image))
    torch.testing.assert_close(materialize(twin)(image), net(image))


def test_finish_then_training_goes_on_with_the_optimizers_state(toy, image):
    net = toy().train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    net.search_space.set_gates([True, False, True, True, False])
    net(image).square().sum().backward()
    optimizer.step()
    finish_search_(net, CHOICE)
    assert all(p in optimizer.state for p in net.parameters())
    optimizer.zero_grad()
    net(image).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_finish_a_baselines_state_dict_still_starts_the_layers(toy, baseline, assert_same_state):
    net, expected = toy(), toy(CHOICE)
    finish_search_(net, CHOICE)
    for model in (net, expected):
        model.load_state_dict(baseline)
    assert_same_state(net.state_dict(), expected.state_dict())


@pytest.mark.parametrize('settings', [dict(operator=dict(type='SlimBlock')), dict(gradient=dict(recompute=True))],
                         ids=str)
def test_finish_keeps_as_little_for_backward_as_a_fresh_model(bottleneck, randomise_, as_replaced, picture, step,
                                                              assert_close, settings):
    """Outputs that can be made again, and layers that are computed again."""
    fresh, model = (build(norm_eval=True, **settings) for build in (bottleneck.replaced, bottleneck.search))
    fresh.load_state_dict(as_replaced(randomise_(model), model.state_dict(), bottleneck.choice))
    model.train(), fresh.train()
    finish_search_(copy.deepcopy(model), {})
    finish_search_(model, bottleneck.choice)
    assert saved_bytes(model, lambda: model(picture)) == saved_bytes(fresh, lambda: fresh(picture))
    assert_close(step(model, picture), step(fresh, picture), 1e-5)


@pytest.mark.parametrize('finished', [False, True], ids=['searching', 'finished'])
def test_with_folded_norms_the_same_gradients_and_less_is_kept(bottleneck, randomise_, gates_of, picture, step,
                                                               assert_close, finished):
    found, kept, x = [], [], picture.double()
    for fold_norm in (True, False):
        model = randomise_(bottleneck.search(norm_eval=True, fold_norm=fold_norm)).double()
        model.train()
        leaves = [torch.zeros((), requires_grad=True) for _ in model.search_space.places]
        model.search_space.set_gates(gates_of(model, bottleneck.choice), leaves)
        if finished:
            finish_search_(model, bottleneck.choice)
        found.append(step(model, x) | {f'gate {index}': leaf.grad for index, leaf in enumerate(leaves) if not finished})
        kept.append(saved_bytes(model, lambda: model(x)))  # noqa: B023
    assert_close(*found, 1e-5)
    assert kept[0] < 0.9 * kept[1]
