"""No weight decay on the fusions' parameters; all else as MMEngine's default."""
import pytest
from torch import nn

from rl_mmdet.engine import RLOptimWrapperConstructor
from rl_mmdet.replacement import computing_layers, replace_blocks_

WRAPPER = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=.1, weight_decay=.05))


def decay_by_parameter(model, paramwise_cfg=None):
    optimizer = RLOptimWrapperConstructor(dict(WRAPPER), paramwise_cfg)(model).optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group['weight_decay'] for group in optimizer.param_groups for p in group['params']}


@pytest.fixture
def replaced(toy_net):
    model = toy_net()
    replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2)))
    return model


@pytest.mark.parametrize('paramwise_cfg', [None, dict(norm_decay_mult=0.)])
def test_coefficients_take_no_weight_decay(replaced, paramwise_cfg):
    decays = decay_by_parameter(replaced, paramwise_cfg)
    assert set(decays) == {name for name, _ in replaced.named_parameters()}
    coefficients = {f'{name}.coeff' for name in computing_layers(replaced)}
    assert coefficients
    assert {decays[name] for name in coefficients} == {0.}
    assert decays['layer1.0.conv1.weight'] == .05


def test_paramwise_cfg_still_applies(replaced):
    assert decay_by_parameter(replaced, dict(norm_decay_mult=0.))['layer1.0.norm1.weight'] == 0.


def test_a_parameter_named_coeff_elsewhere_decays():
    model = nn.Module()
    model.coeff = nn.Parameter(nn.Linear(2, 2).weight.detach())
    assert decay_by_parameter(model) == {'coeff': .05}


def test_the_model_inside_a_wrapper_is_found(replaced):
    wrapped = nn.Module()
    wrapped.module = replaced
    optimizer = RLOptimWrapperConstructor(dict(WRAPPER))(wrapped).optimizer
    assert [group['weight_decay'] for group in optimizer.param_groups] == [.05, 0.]
