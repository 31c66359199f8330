"""BestFit: the blocks whose outputs their neighbours reproduce best."""
import copy
import logging

import pytest
import torch
from torch import nn

from rl_mmdet.replacement import find_chains, replace_blocks_
from rl_mmdet.replacement.computing_layer import LayerSettings
from rl_mmdet.replacement.fusions import ScalarFusion
from rl_mmdet.replacement.gradient import Gradient
from rl_mmdet.replacement.operators import FullBlock
from rl_mmdet.replacement.plans import BestFit, Blocks
from rl_mmdet.replacement.start import Average


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)]


@pytest.fixture
def trained(toy_net, randomise_):
    return randomise_(toy_net())


def by_hand(net, block, batches, **settings):
    """The block's error, by the steps a user would take: replace, load, run both; norms on the batch's statistics."""
    net, twin = copy.deepcopy(net).eval(), copy.deepcopy(net)
    chain, index = block.split('.')
    replace_blocks_(twin, dict(plan=Blocks({chain: [int(index)]}), **settings))
    twin.load_state_dict(net.state_dict())
    twin.eval()
    twin.get_submodule(block).train()
    seen = []
    net.get_submodule(block).register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    difference = change = 0
    with torch.no_grad():
        for batch in batches:
            net(batch)
            h, wanted = seen.pop()
            difference += (twin.get_submodule(block)(h) - wanted).square().sum()
            change += (wanted - h).square().sum() if h.shape == wanted.shape else wanted.square().sum()
    return (difference / change).sqrt().item()


@pytest.mark.parametrize('settings', [
    {},
    dict(fusion=dict(type='TransformFusion', adapt=True), start=dict(type='FitOutputs')),
    dict(operator=dict(type='SlimBlock', scale=0.5)),
    dict(operator=dict(type='Skip')),
])
def test_errors_are_those_of_a_replaced_model_that_loaded_the_weights(trained, batches, settings):
    plan = BestFit(0.4, batches, steps=0)
    replace_blocks_(copy.deepcopy(trained), dict(settings, plan=plan))
    assert len(plan.errors) == (8 if 'adapt' in settings.get('fusion', {}) else 5)
    for block, error in plan.errors.items():
        assert error == pytest.approx(by_hand(trained, block, batches, **settings), rel=1e-4), block
        assert error == pytest.approx(1) or settings.get('operator') != dict(type='Skip')


def test_a_block_between_two_like_it_is_reproduced_and_chosen(trained, batches):
    for index in (2, 4):
        trained.layer2[index].load_state_dict(trained.layer2[3].state_dict())
    for block in trained.layer2:
        block.norm1 = block.norm2 = nn.Identity()  # whose statistics would differ
    plan = BestFit(0.2, batches, steps=5)
    assert replace_blocks_(copy.deepcopy(trained), dict(plan=plan)).replaced == {'layer2': [3]}
    assert plan.errors['layer2.3'] == pytest.approx(0, abs=1e-5)
    assert min(error for block, error in plan.errors.items() if block != 'layer2.3') > 0.1


def test_the_fit_finds_what_a_light_operator_can_reproduce(trained, batches):
    trained.layer2[2].act = nn.Identity()  # then a light operator, which has no activation at its end, can come near
    plans = [BestFit(0.2, batches, steps=steps) for steps in (0, 100)]
    for plan in plans:
        replace_blocks_(copy.deepcopy(trained), dict(plan=plan, operator=dict(type='SlimBlock', width=1.),
                                                     fusion=dict(type='TransformFusion', share=1.)))
    assert plans[0].errors['layer2.2'] == pytest.approx(1)
    assert plans[1].errors['layer2.2'] < 0.8


def test_chosen_are_those_of_smallest_error(trained, batches):
    plan = BestFit(0.6, batches)
    report = replace_blocks_(trained, dict(plan=plan))
    chosen = {row.name for row in report.rows if row.replaced}
    assert chosen == set(sorted(plan.errors, key=plan.errors.get)[:3])


def test_a_block_that_would_make_the_choice_invalid_is_passed_over(trained, batches):
    for index in (2, 3):  # either can take the other's place
        trained.layer2[index].table = nn.Parameter(torch.zeros(7))
    report = replace_blocks_(trained, dict(plan=BestFit(1, batches)))
    assert sum(row.replaced for row in report.rows) == 4


def test_measuring_leaves_the_model_alone(trained, batches, snapshot, assert_same_state):
    trained.train()
    before = snapshot(trained)
    settings = LayerSettings(ScalarFusion(), FullBlock(), Gradient(), Average())
    BestFit(0.5, batches).choose(find_chains(trained), trained, settings)
    after = snapshot(trained)
    assert (after[0], after[2], after[3]) == (before[0], before[2], before[3])
    assert_same_state(after[1], before[1])
    assert not any(module._forward_hooks for module in trained.modules())


def test_errors_are_shown_and_logged(trained, batches, caplog):
    plan = BestFit(0.2, batches)
    with caplog.at_level(logging.INFO, 'rl_mmdet'):
        report = replace_blocks_(trained, dict(plan=plan))
    shown = f'layer2.3 {plan.errors["layer2.3"]:.3f}'
    assert shown in repr(plan)
    assert shown in caplog.text
    assert f'the same choice as a plan: {report.as_plan}' in str(report)


def test_without_batches_names_the_tool(trained):
    match = (r'replacement.plan: BestFit: it needs a trained model and calibration batches.*'
             r"tools/choose_blocks.py CONFIG CHECKPOINT --p 0.25.*dict\(type='Blocks'")
    with pytest.raises(ValueError, match=match):
        replace_blocks_(trained, dict(plan=dict(type='BestFit', p=0.25)))


@pytest.mark.parametrize(('p', 'batches', 'error', 'message'), [
    *((0.5, wrong, TypeError, 'batches must be a list of tensors that the model takes, got')
      for wrong in ('images', [1, 2], torch.zeros(2, 3, 8, 8), [[torch.zeros(1)]])),
    (0.5, [], ValueError, 'batches is empty'),
    (0, [torch.zeros(1)], ValueError, 'p must be a number above 0 and at most 1, got 0'),
], ids=range(6))
def test_wrong_arguments_raise(p, batches, error, message):
    with pytest.raises(error, match=f'BestFit: {message}'):
        BestFit(p, batches)


def test_without_a_model_raises(trained, batches):
    with pytest.raises(ValueError, match='BestFit: it runs the model, so it needs one'):
        BestFit(0.5, batches).choose(find_chains(trained))


@pytest.mark.parametrize(('fusion', 'message'), [
    (dict(type='OwnWeights'), r"replacement.plan: BestFit\(.*\) chooses what is made of other blocks' weights, and"),
    (dict(type='TransformFusion', rank=9), r'replacement.fusion: layer1.1: TransformFusion: rank=9'),
])
def test_a_fusion_that_it_cant_try_is_named(trained, batches, fusion, message):
    with pytest.raises(ValueError, match=message):
        replace_blocks_(trained, dict(plan=BestFit(0.5, batches), fusion=fusion))


def test_a_block_that_never_runs_raises(trained, batches):
    trained.forward = lambda x: x
    with pytest.raises(ValueError, match=r'layer1.1 never runs or changes nothing.*trained'):
        replace_blocks_(trained, dict(plan=BestFit(0.5, batches)))


def test_weights_that_are_not_finite_raise(trained, batches, snapshot):
    trained.layer2[1].conv1.weight.data.fill_(torch.inf)
    before = snapshot(trained)[0]
    with pytest.raises(ValueError, match=r"BestFit: the outputs of layer2.1 or of what replaces it aren't fin"):
        replace_blocks_(trained, dict(plan=BestFit(0.5, batches)))
    assert snapshot(trained)[0] == before
