"""No weight decay on the fusions' parameters, and rates that fall from layer to layer; all else as MMEngine's."""
import pytest
import torch
from mmdet.engine.optimizers import LearningRateDecayOptimizerConstructor
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from rl_mmdet.engine import RLLayerDecayOptimWrapperConstructor, RLOptimWrapperConstructor
from rl_mmdet.engine.optim import RLLearningRateDecayOptimizerConstructor
from rl_mmdet.replacement import computing_layers, replace_blocks_

WRAPPER = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=.1, weight_decay=.05))
REPLACEMENT = dict(plan=dict(type='EveryKth', k=2))
TRANSFORM = dict(REPLACEMENT, operator=dict(type='SlimBlock', width=.5), fusion=dict(type='TransformFusion', rank=1))


class Net(nn.Module):
    """A backbone with a stem, stages of 3 and 6 blocks and what is between, and a head."""

    def __init__(self, body: nn.Module, replacement: dict | None = None) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stem = nn.Conv2d(3, 3, 1)
        self.backbone.layer1 = body.layer1
        self.backbone.between = nn.Conv2d(4, 4, 1)
        self.backbone.layer2 = body.layer2
        self.backbone.coeff = nn.Parameter(torch.ones(2))  # not a fusion's
        self.head = nn.Linear(4, 2)
        if replacement:
            self.backbone.replacement_report = replace_blocks_(self.backbone, replacement)


def by_parameter(constructor, model, setting):
    """A setting of the optimizer's groups, by parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = constructor(model).optimizer.param_groups
    return {names[id(p)]: group[setting] for group in groups for p in group['params']}


def layer_decay(**paramwise_cfg):
    return RLLayerDecayOptimWrapperConstructor(dict(WRAPPER), dict(layer_decay_rate=.5) | paramwise_cfg)


@pytest.mark.parametrize('constructor', [
    RLOptimWrapperConstructor(dict(WRAPPER)), RLOptimWrapperConstructor(dict(WRAPPER), dict(bias_decay_mult=2.)),
    layer_decay()], ids=['one setting', 'paramwise', 'layer decay'])
@pytest.mark.parametrize('replacement', [REPLACEMENT, TRANSFORM], ids=['pairs', 'transform'])
def test_only_what_fusions_learn_takes_no_weight_decay(toy_net, constructor, replacement):
    model = Net(toy_net(), replacement)
    decays = by_parameter(constructor, model, 'weight_decay')
    own = {f'{name}.{key}' for name, layer in computing_layers(model).items()
           for key, _ in layer.named_parameters(recurse=False)}
    assert set(decays) == {name for name, _ in model.named_parameters()}
    assert {name for name, decay in decays.items() if decay == 0.} == own


class ConvNeXt(nn.Module):
    """MMDetection's layer decay asks for this name."""


def test_mmdetections_layer_decay_spares_a_fusion_with_many_pairs(toy_net):
    model = Net(toy_net(), dict(REPLACEMENT, fusion=dict(type='TransformFusion')))
    model.backbone.__class__ = ConvNeXt
    ours, theirs = ({setting: by_parameter(kind(dict(WRAPPER), dict(num_layers=6, decay_rate=.7)), model, setting)
                     for setting in ('weight_decay', 'lr')} for kind in (
        RLLearningRateDecayOptimizerConstructor, LearningRateDecayOptimizerConstructor))
    own = {f'{name}.coeff': 0. for name in computing_layers(model)}
    assert ours == dict(lr=theirs['lr'], weight_decay=theirs['weight_decay'] | own) != theirs


@pytest.mark.parametrize('paramwise_cfg', [None, dict(norm_decay_mult=0., custom_keys={'head': dict(lr_mult=.1)})])
def test_a_baselines_groups_are_those_of_mmengine(toy_net, paramwise_cfg):
    model = Net(toy_net())
    ours, theirs = (constructor(dict(WRAPPER), paramwise_cfg)(model).optimizer.param_groups
                    for constructor in (RLOptimWrapperConstructor, DefaultOptimWrapperConstructor))
    for our, their in zip(ours, theirs, strict=True):
        assert [id(p) for p in our.pop('params')] == [id(p) for p in their.pop('params')]
        assert our == their


def test_without_paramwise_cfg_there_are_two_groups_also_inside_a_wrapper(toy_net):
    wrapped = nn.Module()
    wrapped.module = Net(toy_net(), REPLACEMENT)
    optimizer = RLOptimWrapperConstructor(dict(WRAPPER))(wrapped).optimizer
    assert [group['weight_decay'] for group in optimizer.param_groups] == [.05, 0.]


@pytest.mark.parametrize('replacement', [None, REPLACEMENT], ids=['baseline', 'replaced'])
def test_layer_decay_falls_from_the_head_to_the_stem(toy_net, replacement):
    constructor = layer_decay(custom_keys={'backbone.stem': dict(lr_mult=.1)})
    rates = by_parameter(constructor, Net(toy_net(), replacement), 'lr')
    expected = {'head.weight': .1, 'backbone.stem.weight': .01 * .5 ** 10, 'backbone.between.weight': .1 * .5 ** 7}
    expected |= {f'backbone.{block}.conv1.weight': .1 * .5 ** depth
                 for block, depth in {'layer2.5': 1, 'layer2.0': 6, 'layer1.2': 7, 'layer1.0': 9}.items()}
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


def test_layer_decay_of_a_replaced_model_is_the_baselines(toy_net):
    baseline = by_parameter(layer_decay(), Net(toy_net()), 'lr')
    replaced = by_parameter(layer_decay(), Net(toy_net(), REPLACEMENT), 'lr')
    coefficients = {f'backbone.{block}.coeff': baseline[f'backbone.{block}.conv1.weight']
                    for block in ('layer1.1', 'layer2.1', 'layer2.3')}
    assert replaced == {name: rate for name, rate in baseline.items() if name in replaced} | coefficients


def test_layer_decay_wrong_rate_or_model_is_refused():
    for rate in (None, 0, 1.5, '0.7', True):
        with pytest.raises(ValueError, match='layer_decay_rate must be a number above 0 and at most 1'):
            layer_decay(layer_decay_rate=rate)
    with pytest.raises(ValueError, match='no backbone with chains of blocks'):
        layer_decay()(nn.Linear(2, 2))
