"""Backbones in which only the attention of some blocks is replaced, or another submodule of theirs."""
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.engine import RLLayerDecayOptimWrapperConstructor
from rl_mmdet.replacement import adapt_state_dict, computing_layers, materialize

slow = pytest.mark.slow
PARTS = {'RLSwin': 'attn', 'RLViT': 'attn', 'RLResNet': 'conv2', 'timm_convnext': 'mlp',
         'timm_eva02': 'attn', 'timm_swin': 'attn', 'PVT': 'attn', 'HRNet': 'conv2', 'Res2Net': 'convs'}
"""What is replaced in which case of conftest.py. ConvNeXt's blocks have a parameter beside their submodules."""


@pytest.fixture(params=[pytest.param(name, marks=slow if number > 3 else ()) for number, name in enumerate(PARTS)])
def name(request) -> str:
    return request.param


@pytest.fixture
def build(cases):
    def make(name: str, mode: str = 'detached', **more: Any) -> nn.Module:
        return cases[name].build(mode, operator=dict(type='FullBlock', only=PARTS[name]), **more)
    return make


def results(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """In train mode: outputs, and the gradient of everything that has one."""
    model.train()
    torch.manual_seed(5)
    outs = model(image)
    sum((out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outs).backward()
    return {f'out{i}': out.detach() for i, out in enumerate(outs)} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def removed(model: nn.Module, name: str) -> tuple[str, ...]:
    return tuple(f'{layer}.{PARTS[name]}.' for layer in computing_layers(model))


def test_only_that_is_gone_and_all_else_is_computed_and_learns_as_in_the_plain_model(build, cases, name, image,
                                                                                    randomise_, assert_near):
    model, baseline = randomise_(build(name)), cases[name].build_baseline()
    report, buffers = model.replacement_report, {key for key, _ in baseline.named_buffers()}
    assert {chain: each for chain, each in report.replaced.items() if each} == cases[name].replaced
    gone = {key for key in baseline.state_dict() if key.startswith(removed(model, name)) and key not in buffers}
    pairs = {f'{layer}.coeff' for layer in computing_layers(model)}
    assert set(model.state_dict()) == set(baseline.state_dict()) - gone | pairs
    assert report.removed_parameters == sum(baseline.get_parameter(key).numel() for key in gone)
    plain = materialize(model.double())
    assert set(plain.state_dict()) == set(baseline.state_dict())
    wanted, found = results(plain, image.double()), results(model, image.double())
    assert wanted.keys() - found.keys() == gone
    assert found.keys() - wanted.keys() == pairs
    for key in found.keys() & wanted.keys():
        assert_near(found[key], wanted[key], 1e-9, key)


def test_a_baselines_weights_fit_completely(build, cases, name, randomise_):
    state = randomise_(cases[name].build_baseline()).state_dict()
    model = build(name)
    _, report = adapt_state_dict(model, state)
    assert (report.missing, report.left_over, report.mismatched) == ([], [], {})
    model.load_state_dict(state)
    for key in model.state_dict().keys() & state.keys():
        assert torch.equal(model.state_dict()[key], state[key]), key


def test_init_weights_initialises_what_is_the_blocks_own(build):
    model = build('RLResNet')
    model.init_weights()
    layers = computing_layers(model)
    for block in (*layers.values(), *(kept for layer in layers.values() for kept in layer.kept)):
        assert not block.bn3.weight.any()  # zero_init_residual
        assert block.bn1.weight.eq(1).all()
    assert {tuple(layer.coeff.tolist()) for layer in layers.values()} == {(0.5, 0.5)}
    assert not any(hasattr(module, '_params_init_info') for layer in layers.values()
                   for module in (layer.template, *layer.modules()))


@pytest.mark.parametrize('more', [dict(frozen_stages=1), dict(fold_norm=True), dict(with_cp=True)], ids=str)
def test_it_goes_with_the_arguments_of_a_resnet(build, more, image, randomise_, assert_near):
    plain, model = (randomise_(build('RLResNet', norm_eval=True, **each)).double() for each in ({}, more))
    wanted, found = (results(each, image.double()) for each in (plain, model))
    frozen = {key for key in wanted if key.startswith(('conv1.', 'bn1.', 'layer1.'))}
    assert wanted.keys() - found.keys() == (frozen if 'frozen_stages' in more else set())
    for key in found if 'frozen_stages' not in more else ():
        assert_near(found[key], wanted[key], 1e-9, key)


def test_layer_decay_and_weight_decay_of_its_own_tensors_are_the_baselines(build, cases):
    constructor = RLLayerDecayOptimWrapperConstructor(
        dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=.1, weight_decay=.05)), dict(layer_decay_rate=.5))
    found = []
    for backbone in (build('timm_convnext'), cases['timm_convnext'].build_baseline()):
        model = nn.ModuleDict(dict(backbone=backbone))
        groups = {id(p): (group['lr'], group['weight_decay']) for group in constructor(model).optimizer.param_groups
                  for p in group['params']}
        found.append({name: groups[id(p)] for name, p in model.named_parameters()})
    assert any(name.endswith('blocks.1.gamma') for name in found[0])
    assert all(decay == 0. for name, (_, decay) in found[0].items() if name.endswith('coeff'))
    assert all(found[1][name] == setting for name, setting in found[0].items() if not name.endswith('coeff'))
