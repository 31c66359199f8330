"""EveryKth: which blocks it takes, and how wrong settings are refused."""
import pytest

from rl_mmdet.replacement import find_chains, replace_blocks_
from rl_mmdet.replacement.plans import EveryKth


@pytest.mark.parametrize(('k', 'offset', 'layer1', 'layer2'), [
    (2, 1, [1], [1, 3]), (2, 0, [], [2, 4]), (3, 1, [1], [1, 4]), (4, 3, [], [3]), (100, 1, [1], [1])])
def test_takes_index_modulo_k_equal_offset(toy_net, k, offset, layer1, layer2):
    assert EveryKth(k, offset).choose(find_chains(toy_net())) == {'layer1': layer1, 'layer2': layer2}


def test_default_offset_is_one_and_frozen_stages_are_left_alone(toy_net):
    net = toy_net()
    net.layer1.requires_grad_(False)
    assert EveryKth(2).choose(find_chains(net)) == {'layer1': [], 'layer2': [1, 3]}


@pytest.mark.parametrize('k', [1, 2.0])
def test_wrong_k_raises(k):
    with pytest.raises(ValueError, match=r'EveryKth: k must be an integer of at least 2, got .*k=2 replaces every'):
        EveryKth(k)


@pytest.mark.parametrize('offset', [-1, 3])
def test_wrong_offset_raises(offset):
    with pytest.raises(ValueError, match=r'offset must be an integer of at least 0 and at most 2, got .*\(k is 3\)'):
        EveryKth(3, offset)


def test_repr_has_the_settings_and_the_report_the_choice_as_a_plan(toy_net):
    plan = EveryKth(2)
    report = replace_blocks_(toy_net(), dict(plan=plan))
    assert report.settings['plan'] == repr(plan) == 'EveryKth(k=2, offset=1)'
    assert replace_blocks_(toy_net(), dict(plan=eval(report.as_plan))).replaced == report.replaced
