"""No weight decay on the fusions' parameters; all else as MMEngine's default."""
import pytest
from torch import nn

from rl_mmdet.engine import RLLayerDecayOptimWrapperConstructor, RLOptimWrapperConstructor
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


def test_everything_that_computing_layers_learn_takes_no_weight_decay(toy_net):
    model = toy_net()
    replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2), operator=dict(type='SlimBlock', width=.5),
                                fusion=dict(type='TransformFusion', rank=1)))
    decays = decay_by_parameter(model)
    own = {f'{name}.{kind}' for name in computing_layers(model) for kind in ('coeff', 'up', 'down', 'scale')}
    assert {name for name, decay in decays.items() if decay == 0.} == own


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


# Layer-wise decay

class Net(nn.Module):
    """A backbone with a stem, stages of 3 and 6 blocks and a norm, and a head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stem = nn.Conv2d(3, 3, 1)
        self.backbone.layer1 = body.layer1
        self.backbone.between = nn.Conv2d(4, 4, 1)
        self.backbone.layer2 = body.layer2
        self.head = nn.Linear(4, 2)


def rates_by_parameter(model, **paramwise_cfg):
    wrapper = RLLayerDecayOptimWrapperConstructor(dict(WRAPPER), dict(layer_decay_rate=.5) | paramwise_cfg)(model)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group['lr'] for group in wrapper.optimizer.param_groups for p in group['params']}


@pytest.fixture
def decayed(toy_net):
    """The rate of every parameter of a baseline, and of its replaced twin."""
    baseline, replaced = Net(toy_net()), Net(toy_net())
    replaced.backbone.replacement_report = replace_blocks_(replaced.backbone, dict(plan=dict(type='EveryKth', k=2)))
    return rates_by_parameter(baseline), rates_by_parameter(replaced)


@pytest.mark.parametrize(('name', 'depth'), [
    ('head.weight', 0), ('backbone.layer2.5.conv1.weight', 1), ('backbone.layer2.0.norm1.bias', 6),
    ('backbone.between.weight', 7), ('backbone.layer1.2.conv1.weight', 7), ('backbone.layer1.0.conv1.weight', 9),
    ('backbone.stem.weight', 10)])
def test_layer_decay_falls_from_the_head_to_the_stem(decayed, name, depth):
    for rates in decayed:
        assert rates[name] == pytest.approx(.1 * .5 ** depth)


def test_layer_decay_of_kept_blocks_is_the_baselines(decayed):
    baseline, replaced = decayed
    kept = {name for name in replaced if not name.endswith('.coeff')}
    assert len(kept) < len(baseline)
    assert {name: replaced[name] for name in kept} == {name: baseline[name] for name in kept}


@pytest.mark.parametrize('block', ['layer1.1', 'layer2.1', 'layer2.3'])
def test_layer_decay_of_coefficients_is_their_places(decayed, block):
    baseline, replaced = decayed
    assert replaced[f'backbone.{block}.coeff'] == baseline[f'backbone.{block}.conv1.weight']


def test_layer_decay_multiplies_with_custom_keys(toy_net):
    rates = rates_by_parameter(Net(toy_net()), custom_keys={'backbone.stem': dict(lr_mult=.1)})
    assert rates['backbone.stem.weight'] == pytest.approx(.01 * .5 ** 10)


def test_layer_decay_coefficients_take_no_weight_decay(toy_net):
    model = Net(toy_net())
    model.backbone.replacement_report = replace_blocks_(model.backbone, dict(plan=dict(type='EveryKth', k=2)))
    coefficients = {id(layer.coeff) for layer in computing_layers(model).values()}
    wrapper = RLLayerDecayOptimWrapperConstructor(dict(WRAPPER), dict(layer_decay_rate=.5))(model)
    decays = {id(group['params'][0]): group['weight_decay'] for group in wrapper.optimizer.param_groups}
    assert {decays[key] for key in coefficients} == {0.}


@pytest.mark.parametrize('rate', [None, 0, 1.5, '0.7', True])
def test_layer_decay_wrong_rate_is_refused(rate):
    with pytest.raises(ValueError, match='layer_decay_rate must be a number above 0 and at most 1'):
        RLLayerDecayOptimWrapperConstructor(dict(WRAPPER), dict(layer_decay_rate=rate))


def test_layer_decay_without_a_backbone_is_refused():
    with pytest.raises(ValueError, match='no backbone with chains of blocks'):
        RLLayerDecayOptimWrapperConstructor(dict(WRAPPER), dict(layer_decay_rate=.5))(nn.Linear(2, 2))
