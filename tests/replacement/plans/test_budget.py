"""Budget: as few blocks as bring the model down to a size or to a cost."""
import logging

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rl_mmdet.replacement import find_chains, replace_blocks_
from rl_mmdet.replacement.plans import Blocks, Budget

SMALL = dict(image_size=(16, 16))
ORDER = [('layer2', 2), ('layer2', 3), ('layer1', 1), ('layer2', 1), ('layer2', 4)]
"""Of ToyNet's blocks that can be replaced: by the distance to the border, each chain in turn."""


def learnable(net):
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def flops(net):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, 3, 16, 16))
    return counter.get_total_flops()


def first(count):
    chosen = {}
    for name, index in ORDER[:count]:
        chosen[name] = sorted([*chosen.get(name, []), index])
    return chosen


@pytest.mark.parametrize('count', (1, 3, 5))
def test_params_replaces_as_few_blocks_as_reach_the_number(toy_net, count):
    net = toy_net()
    replace_blocks_(net, dict(plan=Blocks(first(count))))
    target = learnable(net)
    assert replace_blocks_(toy_net(), dict(plan=Budget(params=target))).replaced == first(count)
    if count < 5:
        assert replace_blocks_(toy_net(), dict(plan=Budget(params=target - 1))).replaced == first(count + 1)


def test_params_may_be_a_part_of_the_unreplaced_models_that_learn(toy_net):
    net = toy_net()
    net.layer1.requires_grad_(False)
    target = 1 - 1e-6
    assert replace_blocks_(net, dict(plan=Budget(params=target))).replaced == {'layer2': [2]}


def test_params_include_what_fusion_and_operator_learn(toy_net):
    settings = dict(fusion=dict(type='ChannelFusion'), operator=dict(type='SlimBlock'))
    net = toy_net()
    replace_blocks_(net, dict(settings, plan=Blocks(first(3))))
    target = learnable(net)
    assert replace_blocks_(toy_net(), dict(settings, plan=Budget(params=target))).replaced == first(3)
    assert replace_blocks_(toy_net(), dict(settings, plan=Budget(params=target - 1))).replaced == first(4)


def test_flops_replaces_as_few_blocks_as_reach_the_number(toy_net):
    net, operator = toy_net(), dict(type='SlimBlock')
    replace_blocks_(net, dict(plan=Blocks(first(3)), operator=operator))
    plan = Budget(flops=flops(net), **SMALL)
    assert replace_blocks_(toy_net(), dict(plan=plan, operator=operator)).replaced == first(3)


def test_blocks_that_would_make_the_choice_invalid_are_passed_over(toy_net):
    net = toy_net()
    for index in (2, 3, 4):  # one of them has to stay, for the others' tables
        net.layer2[index].table = nn.Parameter(torch.zeros(7))
    least = replace_blocks_(toy_net(), dict(plan=Blocks(first(4)))).removed_parameters
    report = replace_blocks_(net, dict(plan=Budget(params=learnable(net) - least)))
    assert report.replaced == {'layer1': [1], 'layer2': [1, 2, 3]}


def test_measuring_leaves_model_and_random_numbers_alone(toy_net, snapshot, assert_same_state):
    net = toy_net().train()
    net.layer2[0].eval()
    before, random = snapshot(net), torch.get_rng_state()
    Budget(params=0.7).choose(find_chains(net), net)
    with pytest.raises(ValueError, match="can't be reached"):
        Budget(flops=0.7, **SMALL).choose(find_chains(net), net)
    after = snapshot(net)
    assert (after[0], after[2], after[3]) == (before[0], before[2], before[3])
    assert_same_state(after[1], before[1])
    assert torch.equal(torch.get_rng_state(), random)


def test_cost_before_and_after_is_logged(toy_net, caplog):
    net = toy_net()
    before = learnable(net)
    with caplog.at_level(logging.INFO, 'rl_mmdet'):
        replace_blocks_(net, dict(plan=Budget(params=0.9)))
    assert learnable(net) <= 0.9 * before
    assert f'Budget: params=0.9: {learnable(net):,} learnable parameters' in caplog.text
    assert f'{before:,} with none' in caplog.text


@pytest.mark.parametrize(('arguments', 'message'), [
    ({}, 'give either params or flops, got neither'),
    (dict(params=0.5, flops=0.5), 'give either params or flops, got both'),
    *((dict(params=wrong), r'params must be a float above 0 and below 1 .*, got ')
      for wrong in (0.0, 1.0, 2e9, 1, True)),
    (dict(flops='0.5'), r"flops must be a float above 0 and below 1 .*, got '0.5'"),
    *((dict(flops=0.5, image_size=wrong), r'image_size must be \(height, width\) in pixels')
      for wrong in (256, (256,), (0, 256), (256.0, 256), 'ab', (True, 8))),
])
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=f'Budget: {message}'):
        Budget(**arguments)


def test_already_met_raises(toy_net):
    with pytest.raises(ValueError, match=r'params=1000000 .* is met without replacing any block'):
        replace_blocks_(toy_net(), dict(plan=Budget(params=10 ** 6)))


def test_params_out_of_reach_says_what_all_candidates_give(toy_net, snapshot, assert_same_state):
    net, smallest = toy_net(), toy_net()
    replace_blocks_(smallest, dict(plan=Blocks(first(5))))
    before, lowest = snapshot(net), f'{learnable(smallest):,}'
    match = (rf'params=2 \(2 learnable parameters\) can\'t be reached: the lowest is {lowest} .*'
             rf'{lowest} with all 5 candidates replaced$')
    with pytest.raises(ValueError, match=match):
        replace_blocks_(net, dict(plan=Budget(params=2)))
    assert_same_state(snapshot(net)[1], before[1])


def test_flops_with_full_block_names_operators_that_save_some(toy_net):
    match = (r'the lowest is .* \(1.000 of .*FullBlock .* saves no forward computation.*'
             r'fits: DepthwiseBlock, SlimBlock$')
    with pytest.raises(ValueError, match=match):
        replace_blocks_(toy_net(), dict(plan=Budget(flops=0.7, **SMALL)))


def test_fusion_that_fits_no_block_names_the_fusion(toy_net):
    with pytest.raises(ValueError, match=r'^replacement.fusion: layer1.1: TransformFusion: rank=9'):
        replace_blocks_(toy_net(), dict(plan=Budget(params=0.9), fusion=dict(type='TransformFusion', rank=9)))


def test_without_a_model_raises(toy_net):
    with pytest.raises(ValueError, match='Budget: it measures the model, so it needs one'):
        Budget(params=0.5).choose(find_chains(toy_net()))
