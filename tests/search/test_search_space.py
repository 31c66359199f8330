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
from rl_mmdet.search.gated_block import GatedBlock
from rl_mmdet.search.search_space import finish_search_

LEARNED = dict(type='LearnedPlan', budget=dict(params=0.99))
OPEN = ['layer1.1', 'layer2.1', 'layer2.2', 'layer2.3', 'layer2.4']
CHOICE = {'layer1': [1], 'layer2': [2, 3]}
REPLACED = ['layer1.1', 'layer2.2', 'layer2.3']


@pytest.fixture
def toy(toy_net, randomise_) -> Callable[..., nn.Module]:
    """A ToyNet with random weights in which a plan is learned, or this choice is replaced."""
    def build(choice: dict[str, list[int]] | None = None, **settings: Any) -> nn.Module:
        net = toy_net()
        plan = LEARNED if choice is None else dict(type='Blocks', blocks=choice)
        net.report = replace_blocks_(net, dict(settings, plan=plan))
        return randomise_(net)
    return build


@pytest.fixture
def baseline(toy_net, randomise_) -> dict[str, Tensor]:
    return randomise_(toy_net(), seed=2).state_dict()


# What is open

def test_all_blocks_that_can_be_replaced_are_open(toy):
    net = toy()
    assert [place.name for place in net.search_space.places] == OPEN
    assert [name for name, module in net.named_modules() if isinstance(module, GatedBlock)] == OPEN
    assert net.search_space.open


def test_blocks_of_frozen_stages_are_not_open(toy_net):
    net = toy_net()
    net.layer1.requires_grad_(False)
    replace_blocks_(net, dict(plan=LEARNED))
    assert [place.name for place in net.search_space.places] == OPEN[1:]


def test_report_says_what_is_open(toy):
    report = toy().report
    assert [row.name for row in report.rows if row.open] == OPEN
    assert not report.replaced
    text = str(report)
    assert text.startswith('5 of 9 blocks may be replaced; the search decides')
    assert '  layer2.2 (Unit): open' in text
    assert "  layer1.0 (Unit): kept, can't be replaced: no kept block before it in its stage" in text
    assert report.settings['plan'].startswith('LearnedPlan(')


def test_blocks_stay_what_they_are(toy, toy_net):
    net, plain = toy(), toy_net()
    for name in OPEN:
        assert isinstance(net.get_submodule(name), type(plain.get_submodule(name)))
        assert type(net.get_submodule(name)).__name__ == 'Unit'


def test_state_dict_has_the_baselines_keys_and_those_of_the_layers_beside(toy, toy_net):
    keys = list(toy().state_dict())
    assert [key for key in keys if '.replaced.' not in key] == list(toy_net().state_dict())
    for name in OPEN:
        alone = toy({name[:6]: [int(name[-1])]})
        assert ([key.replace('.replaced.', '.') for key in keys if key.startswith(f'{name}.replaced.')]
                == [key for key in alone.state_dict() if key.startswith(f'{name}.')])


def test_parameters_of_kept_blocks_are_the_models_own(toy_net):
    net = toy_net()
    before = dict(net.named_parameters())
    replace_blocks_(net, dict(plan=LEARNED))
    after = dict(net.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {f'{name}.replaced.coeff' for name in OPEN}


# Choices

def test_choice_and_gates(toy):
    space = toy().search_space
    assert space.choice([True, False, True, True, False]) == CHOICE
    assert space.choice([False] * 5) == {'layer1': [], 'layer2': []}


def test_all_fit_where_first_and_last_blocks_are_kept(toy):
    assert toy().search_space.fits([True] * 5)


def test_fits_where_first_and_last_blocks_are_open_too(toy_net):
    """With ``adapt`` each of them can be replaced, and not all at once: the weights must come from somewhere."""
    net = nn.Sequential(nn.Sequential(*list(toy_net().layer2)[:3]))
    replace_blocks_(net, dict(plan=LEARNED, fusion=dict(adapt=True)))
    space = net.search_space
    assert [space.fits([True] * 3), space.fits([True, True, False]), space.fits([False] * 3)] == [False, True, True]


# Loading

def test_load_baseline_strictly(toy, baseline):
    result = toy().load_state_dict(baseline, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


@pytest.mark.parametrize('pretrained', ['average', 'least_squares'])
def test_load_baseline_fits_each_layer_as_if_it_alone_was_replaced(toy, baseline, pretrained):
    net = toy(fusion=dict(pretrained=pretrained))
    net.load_state_dict(baseline)
    found = net.state_dict()
    for name in OPEN:
        alone = toy({name[:6]: [int(name[-1])]}, fusion=dict(pretrained=pretrained))
        alone.load_state_dict(baseline)
        for key, value in alone.state_dict().items():
            assert torch.equal(found[key.replace(f'{name}.', f'{name}.replaced.')], value), key


def test_load_baseline_keeps_the_blocks_and_copies_their_statistics(toy, baseline):
    net = toy()
    net.load_state_dict(baseline)
    found = net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in baseline.items())
    for name in OPEN:
        for buffer, value in net.get_submodule(name).replaced.named_buffers():
            assert torch.equal(value, baseline[f'{name}.{buffer}'])
            assert value is not net.get_submodule(name).get_buffer(buffer)


def test_load_baseline_marks_the_norms_stale(toy, baseline):
    net = toy()
    for layer in computing_layers(net).values():
        layer.norm_stale = False
    net.load_state_dict(baseline)
    assert all(layer.norm_stale for layer in computing_layers(net).values())
    assert len(stale_norms(net.eval())) == 10


def test_load_baseline_by_mmengine_and_with_a_prefix(toy, baseline, tmp_path, assert_same_state):
    expected = toy()
    expected.load_state_dict(baseline)
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in baseline.items()}), tmp_path / 'b.pth')
    whole = nn.Module()
    whole.backbone = toy()
    load_checkpoint(whole, str(tmp_path / 'b.pth'))
    assert_same_state(whole.backbone.state_dict(), expected.state_dict())


def test_load_own_state_is_taken_as_it_is(toy, randomise_, assert_same_state, image, caplog):
    net, other = toy(), randomise_(toy(), seed=5)
    with caplog.at_level(logging.INFO, 'rl_mmdet'):
        other.load_state_dict(net.state_dict())
    assert not caplog.records
    assert_same_state(other.state_dict(), net.state_dict())
    assert not any(layer.norm_stale for layer in computing_layers(other).values())


def test_load_baseline_with_buffers_that_loading_makes(randomise_):
    """DetectoRS' convolutions make buffers of their weights as they load them."""
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


# The end of the search

def test_finish_is_the_ordinary_replaced_model(searched, randomise_, as_replaced, gates_of, step, assert_same_state,
                                               assert_equal, picture):
    model, expected = randomise_(searched.search()), searched.replaced()
    kinds = [(name, type(module)) for name, module in expected.named_modules()]
    expected.load_state_dict(as_replaced(model, model.state_dict(), searched.choice))
    tensors = as_replaced(model, {name: torch.tensor(id(p)) for name, p in model.named_parameters()}, searched.choice)
    model.train(), expected.train()
    model.search_space.set_gates(gates_of(model, searched.choice))
    before = step(model, picture)
    wanted = step(expected, picture)
    report = finish_search_(model, searched.choice)
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert not hasattr(model, 'search_space')
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, int(i)) for name, i in tensors.items()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    assert_same_state(model.state_dict(), expected.state_dict())
    assert all(torch.equal(before[name], wanted[name]) for name in wanted if name.startswith('out'))
    assert_equal(step(model, picture), step(expected, picture))
    assert report.replaced == searched.choice
    assert report.rows == expected.replacement_report.rows


def test_finish_needs_no_gates_set_before(toy, toy_net, as_replaced, image):
    """Whatever was drawn last."""
    net, expected = toy().eval(), toy(CHOICE).eval()
    expected.load_state_dict(as_replaced(net, net.state_dict(), CHOICE))
    net.search_space.set_gates([False, True, False, False, True], settled=[False, True, True, True, False])
    finish_search_(net, {'layer2': (3, 2), 'layer1': [1]})
    assert torch.equal(net(image), expected(image))
    assert [(layer.before, layer.after) for layer in (net.layer2[2], net.layer2[3])] == [
        (net.layer2[1], net.layer2[4])] * 2


def test_finish_leaves_nothing_behind(toy, toy_net):
    net, kind = toy(), type(toy_net().layer2[0])
    net.search_space.set_gates([False] * 5, [torch.zeros((), requires_grad=True) for _ in range(5)])
    finish_search_(net, CHOICE)
    assert list(computing_layers(net)) == REPLACED
    kept = [net.layer1[0], net.layer1[2], *(net.layer2[index] for index in (0, 1, 4, 5))]
    assert all(type(block) is kind for block in kept)
    assert not any(hasattr(module, name) for module in net.modules() for name in ('gate', 'replaced', 'search_space'))


def test_finish_with_nothing_replaced_is_the_baseline(toy, toy_net, as_replaced, assert_same_state, image):
    net, plain = toy().eval(), toy_net().eval()
    plain.load_state_dict(as_replaced(net, net.state_dict(), {}))
    report = finish_search_(net, {})
    assert_same_state(net.state_dict(), plain.state_dict())
    assert torch.equal(net(image), plain(image))
    assert not report.replaced


def test_finish_report_shows_the_choice_as_a_plan(toy):
    net = toy()
    report = finish_search_(net, CHOICE)
    text = str(report)
    assert text.startswith('3 of 9 blocks replaced by computing layers: ')
    assert f"the same choice as a plan: dict(type='Blocks', blocks={CHOICE})" in text
    assert '  layer2.2 (Unit): replaced, from layer2.1 and layer2.4; learns 2' in text
    assert '  layer2.1 (Unit): kept\n' in text


def test_finish_of_a_copy_leaves_the_model_searching(toy, image):
    net = toy().eval()
    twin = copy.deepcopy(net)
    finish_search_(twin, CHOICE)
    assert net.search_space.open
    net.search_space.set_gates([True, False, True, True, False])
    assert torch.equal(net(image), twin(image))


def test_finish_then_training_goes_on_with_the_optimizers_state(toy, image):
    net = toy().train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    net.search_space.set_gates([True, False, True, True, False])
    net(image).square().sum().backward()
    optimizer.step()
    momentum = {p: optimizer.state[p]['momentum_buffer'] for p in net.parameters() if p in optimizer.state}
    finish_search_(net, CHOICE)
    assert all(p in momentum for p in net.parameters())
    optimizer.zero_grad()
    net(image).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_finish_a_baselines_state_dict_still_starts_the_layers(toy, baseline, assert_same_state):
    net, expected = toy(), toy(CHOICE)
    finish_search_(net, CHOICE)
    for model in (net, expected):
        model.load_state_dict(baseline)
    assert_same_state(net.state_dict(), expected.state_dict())


@pytest.mark.parametrize('choice', [{'layer9': [1]}, {'layer2': [0]}, {'layer2': [17]}], ids=str)
def test_finish_refuses_blocks_that_are_not_open(toy, choice):
    net = toy()
    with pytest.raises(ValueError):
        finish_search_(net, choice)
    assert net.search_space.open


@pytest.mark.parametrize('gradient', [dict(sample=1, memory='rebuild'), dict(sample=1, memory='recompute')],
                         ids=['rebuild', 'recompute'])
def test_finish_outputs_are_rebuilt_as_in_a_fresh_model(search_case, randomise_, as_replaced, picture, step, gradient):
    case = search_case('bottleneck')
    fresh = case.replaced(gradient=gradient, norm_eval=True)
    model = randomise_(case.search(gradient=gradient, norm_eval=True))
    fresh.load_state_dict(as_replaced(model, model.state_dict(), case.choice))
    model.train(), fresh.train()
    finish_search_(model, case.choice)
    followed = {name: layer.followed for name, layer in computing_layers(model).items()}
    assert followed == {name: layer.followed for name, layer in computing_layers(fresh).items()}
    assert all(followed.values())
    assert (saved_bytes(model, lambda: model(picture)) == saved_bytes(fresh, lambda: fresh(picture))
            < saved_bytes(plain := materialize(fresh), lambda: plain(picture)))
    found, wanted = step(model, picture), step(fresh, picture)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_materialize_is_refused_until_the_search_is_finished(toy, image, assert_same_state):
    net = toy().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for module in (net, net.layer2):
        with pytest.raises(ValueError, match="a plan is still being learned for this model, so it isn't known which "
                                             'blocks are replaced; finish the search first'):
            materialize(module)
    assert_same_state(net.state_dict(), before)
    finish_search_(net, CHOICE)
    torch.testing.assert_close(materialize(net)(image), net(image))


def test_a_model_that_is_searched_isnt_searched_again(toy, snapshot):
    net = toy()
    before = snapshot(net)
    with pytest.raises(ValueError, match='replacement: '):
        replace_blocks_(net, dict(plan=LEARNED))
    assert snapshot(net)[0] == before[0]


# With folded norms

@pytest.fixture
def folded(search_case, randomise_) -> Callable[..., nn.Module]:
    def build(fold_norm: bool, **more: Any) -> nn.Module:
        case = search_case('bottleneck')
        model = randomise_(case.search(norm_eval=True, fold_norm=fold_norm, **more)).double()
        model.train()
        return model
    return build


@pytest.mark.parametrize('gradient', [None, dict(mode='coupled'), dict(sample=1)], ids=str)
@pytest.mark.parametrize('finished', [False, True], ids=['searching', 'finished'])
def test_fold_norm_the_same_gradients(folded, gates_of, search_case, picture, gradient, finished):
    choice, found = search_case('bottleneck').choice, []
    for fold_norm in (True, False):
        model = folded(fold_norm, gradient=gradient)
        leaves = [torch.zeros((), requires_grad=True) for _ in model.search_space.places]
        gates = gates_of(model, choice)
        model.search_space.set_gates([gates[0], *[not gate for gate in gates[1:]]], leaves)
        if finished:
            finish_search_(model, choice)
        outs = model(picture.double())
        sum(out.square().sum() for out in outs).backward()
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                     | {f'gate {index}': leaf.grad for index, leaf in enumerate(leaves) if leaf.grad is not None})
        assert ('FoldingConv2d' in kinds.values()) == fold_norm
        if fold_norm:
            assert kinds['layer1.2.conv1'] == 'FoldingConv2d'
            assert kinds['layer2.1.conv1' if finished else 'layer2.1.replaced.conv1'] == (
                'Conv2d' if gradient == dict(sample=1) else 'FoldingConv2d')
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-5 * value.abs().max().item())


def test_fold_norm_keeps_less_while_searching_and_after(folded, search_case, picture):
    kept = {}
    for fold_norm in (True, False):
        model = folded(fold_norm)
        kept['searching', fold_norm] = saved_bytes(model, lambda: model(picture.double()))  # noqa: B023
        finish_search_(model, search_case('bottleneck').choice)
        kept['finished', fold_norm] = saved_bytes(model, lambda: model(picture.double()))  # noqa: B023
    assert kept['searching', True] < 0.8 * kept['searching', False]
    assert kept['finished', True] < kept['finished', False]


def test_fold_norm_materializes(folded, search_case, picture):
    model = folded(True)
    finish_search_(model, search_case('bottleneck').choice)
    plain = materialize(model)
    assert {type(module).__name__ for module in plain.modules()} >= {'Conv2d', 'BatchNorm2d', 'Bottleneck'}
    assert not [module for module in plain.modules() if type(module).__name__.startswith('Fold')]
    for one, other in zip(plain(picture.double()), model(picture.double()), strict=True):
        torch.testing.assert_close(one, other)
