"""A baseline checkpoint into a replaced model, by every road a checkpoint takes."""
import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

import rl_mmdet.models  # noqa: F401  registers RLResNet
from rl_mmdet.replacement import adapt_state_dict, computing_layers, replace_blocks_

BLOCKS = {'layer1': [1], 'layer2': [2, 3]}
LAYERS = ['layer1.1', 'layer2.2', 'layer2.3']


@pytest.fixture
def replaced(toy_net):
    def build(**settings) -> nn.Module:
        net = toy_net()
        replace_blocks_(net, dict(settings, plan=dict(type='Blocks', blocks=BLOCKS)))
        return net
    return build


@pytest.fixture
def baseline(toy_net, randomise_) -> dict[str, Tensor]:
    """State dict of a baseline with random weights, whose block layer2.2 is the average of layer2.1 and layer2.4."""
    state = randomise_(toy_net()).state_dict()
    for name, _ in toy_net().layer2[2].named_parameters():
        state[f'layer2.2.{name}'] = (state[f'layer2.1.{name}'] + state[f'layer2.4.{name}']) / 2
    return state


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def without(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def stale(net: nn.Module) -> list[bool]:
    return [layer.norm_stale for layer in computing_layers(net).values()]


# torch's own load_state_dict

def test_load_state_dict_baseline_fills_the_model_and_stays_as_it_is(replaced, baseline, toy_net, assert_same_state):
    net, plain, before = replaced().eval(), toy_net().eval(), copy.deepcopy(baseline)
    nn.init.constant_(net.layer2[2].coeff, 3)
    result = net.load_state_dict(baseline, strict=True)
    plain.load_state_dict(baseline)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_state(baseline, before)
    own = {key: value for key, value in net.state_dict().items() if not key.endswith('coeff')}
    assert all(torch.equal(value, baseline[key]) for key, value in own.items())
    x = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(net.layer2[2](x), plain.layer2[2](x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('settings', [
    dict(fusion=dict(init=-0.3)),
    dict(fusion=dict(type='TransformFusion', rank=1)),
    dict(operator=dict(type='SlimBlock', scale=0.3), fusion=dict(type='TransformFusion', rank=1)),
], ids=str)
def test_load_state_dict_baseline_lets_all_that_layers_learn_begin_anew(replaced, baseline, randomise_, settings):
    net, new = randomise_(replaced(**settings)), replaced(**settings)
    net.load_state_dict(baseline)
    for layer, other in zip(computing_layers(net).values(), computing_layers(new).values(), strict=True):
        assert all(torch.equal(value, other.own_parameters()[name]) for name, value in layer.own_parameters().items())


def test_load_state_dict_own_leaves_coefficients_as_saved_and_nothing_stale(replaced, baseline, randomise_):
    source, target = randomise_(replaced()), replaced()
    target.load_state_dict(baseline)
    assert stale(target) == [True] * 3
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target.layer2[2].coeff, source.layer2[2].coeff)
    assert stale(target) == [False] * 3


def test_load_state_dict_baseline_without_a_removed_block(replaced, baseline):
    state = without(baseline, 'layer2.2.')
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "layer2.2.coeff"'):
        replaced().load_state_dict(state)
    net = replaced()
    net.load_state_dict(state, strict=False)
    assert stale(net) == [True, False, True]


def test_load_state_dict_of_other_parts_of_a_detector_changes_nothing_for_the_layers(replaced, baseline):
    whole = nn.ModuleDict({'net': replaced(start=dict(type='FitOutputs')), 'head': nn.Linear(2, 2)})
    whole.load_state_dict(with_prefix(baseline, 'net.'), strict=False)
    whole.load_state_dict(with_prefix(nn.Linear(2, 2).state_dict(), 'head.'), strict=False)
    assert stale(whole.net) == fits(whole.net) == [True, True, True]


def fits(net: nn.Module) -> list[bool]:
    return [layer.fit_wanted for layer in computing_layers(net).values()]


@pytest.mark.parametrize(('name', 'change', 'wanted'), [
    ('conv2.weight', None, [True, False, True]),  # of this block alone
    ('conv2.weight', lambda weight: weight[:2], [True, False, True])], ids=['lacking', 'of_another_shape'])
def test_a_removed_block_that_is_incomplete_is_not_fitted_to_and_the_log_says_so(
        replaced, baseline, caplog, name, change, wanted):
    net, value = replaced(start=dict(type='FitOutputs')), baseline.pop(f'layer2.2.{name}')
    if change:
        baseline[f'layer2.2.{name}'] = change(value)
    net.load_state_dict(baseline)
    assert fits(net) == wanted
    assert f'layer2.2 is not fitted to the block that it replaces, which has no {name} in the checkpoint' in caplog.text


def test_what_no_block_has_in_the_checkpoint_is_no_reason_against_a_fit(replaced, baseline):
    net = replaced(start=dict(type='FitOutputs'))
    net.load_state_dict({key: value for key, value in baseline.items() if not key.endswith('conv2.weight')},
                        strict=False)
    assert fits(net) == [True, True, True]


def test_load_state_dict_into_a_copy_and_into_a_part_of_a_larger_model(replaced, baseline):
    net = replaced()
    nn.init.constant_(net.layer2[2].coeff, 3)
    twin = copy.deepcopy(net)
    twin.load_state_dict(baseline)
    assert [each.layer2[2].coeff.tolist() for each in (twin, net)] == [[0.5, 0.5], [3, 3]]
    whole = nn.ModuleDict({'net': net, 'head': nn.Linear(2, 2)})
    whole.load_state_dict(with_prefix(baseline, 'net.') | with_prefix(nn.Linear(2, 2).state_dict(), 'head.'))
    assert net.layer2[2].coeff.tolist() == [0.5, 0.5]


def test_load_state_dict_logs_the_report(replaced, baseline, caplog):
    with caplog.at_level('INFO', logger='rl_mmdet'):
        replaced().load_state_dict(baseline)
    assert 'used for initialisation: 3 removed blocks' in caplog.text


# mmengine's load_checkpoint, which walks the modules one by one; the backbone's init_cfg, and a whole detector

BACKBONE = dict(depth=50, base_channels=4, norm_eval=True)
REPLACEMENT = dict(plan=dict(type='EveryKth', k=4))


@pytest.fixture(scope='module')
def resnet(randomise_) -> dict[str, Tensor]:
    """State dict of a small R-50 with random weights."""
    return randomise_(MODELS.build(dict(type='ResNet', **BACKBONE))).state_dict()


def assert_initialised(backbone: nn.Module, state: dict[str, Tensor]) -> None:
    """Kept tensors and buffers are the checkpoint's, a = b = 1/2, all norms are stale."""
    own = {key: value for key, value in backbone.state_dict().items() if not key.endswith('coeff')}
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    assert backbone.layer3[1].coeff.tolist() == [0.5, 0.5]
    assert stale(backbone) == [True] * 4


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_init_cfg_pretrained_initialises_the_backbone(resnet, tmp_path, prefix):
    torch.save(dict(state_dict=with_prefix(resnet, prefix)), tmp_path / 'base.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'), **dict(prefix=prefix) if prefix else {})
    backbone = MODELS.build(dict(type='RLResNet', **BACKBONE, replacement=REPLACEMENT, init_cfg=init_cfg))
    backbone.init_weights()
    assert_initialised(backbone, resnet)


def detector(backbone: dict) -> nn.Module:
    return MODELS.build(dict(
        type='RetinaNet', data_preprocessor=dict(type='mmdet.DetDataPreprocessor'),
        backbone=dict(**BACKBONE, **backbone),
        neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=8, num_outs=5, init_cfg=None),
        bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1,
                       init_cfg=None)))


def test_load_checkpoint_of_a_whole_detector(resnet, randomise_, tmp_path):
    state = randomise_(detector(dict(type='ResNet'))).state_dict() | with_prefix(resnet, 'backbone.')
    torch.save(dict(state_dict=state), tmp_path / 'detector.pth')
    model, again = (detector(dict(type='RLResNet', replacement=REPLACEMENT)) for _ in range(2))
    load_checkpoint(model, str(tmp_path / 'detector.pth'), map_location='cpu', strict=True)
    assert_initialised(model.backbone, resnet)
    for key, value in model.state_dict().items():
        assert key.startswith('backbone.') or torch.equal(value, state[key]), key
    nn.init.constant_(model.backbone.layer3[1].coeff, 3)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'own.pth')
    load_checkpoint(again, str(tmp_path / 'own.pth'), map_location='cpu', strict=True)
    assert again.backbone.layer3[1].coeff.tolist() == [3, 3]
    assert stale(again) == [False] * 4


# adapt_state_dict and its report

def test_adapt_baseline_gives_the_replaced_models_keys(replaced, baseline, assert_same_state):
    net, before = replaced(), copy.deepcopy(baseline)
    own = copy.deepcopy(net.state_dict())
    adapted, report = adapt_state_dict(net, baseline)
    assert set(adapted) == set(report.loaded) == set(own)
    assert_same_state(baseline, before)
    assert_same_state(net.state_dict(), own)
    assert report.initialised == LAYERS


def test_adapt_own_state_dict_passes_unchanged(replaced, randomise_, assert_same_state):
    state = dict(randomise_(replaced()).state_dict())
    adapted, report = adapt_state_dict(replaced(), state)
    assert_same_state(adapted, state)
    assert report.initialised == []


def test_adapt_with_prefix_leaves_other_keys_alone(replaced, baseline):
    other = torch.ones(1)
    state, report = adapt_state_dict(replaced(), with_prefix(baseline, 'net.') | {'head.weight': other}, 'net.')
    assert state['head.weight'] is other
    assert (report.missing, report.left_over) == ([], [])


@pytest.mark.parametrize(('lost', 'missing', 'initialised'), [
    ('layer2.5.conv1.weight', ['layer2.5.conv1.weight'], LAYERS),
    ('layer2.5.norm1.num_batches_tracked', [], LAYERS),
    ('layer2.4.conv1.weight', ['layer2.4.conv1.weight'], LAYERS),  # a neighbour's
    ('layer2.2.conv1.weight', [], LAYERS),  # a removed block's
    (('layer2.2.conv', 'layer2.2.norm1.weight', 'layer2.2.norm1.bias', 'layer2.2.norm2.weight', 'layer2.2.norm2.bias'),
     ['layer2.2.coeff'], ['layer1.1', 'layer2.3']),
])
def test_report_of_an_incomplete_checkpoint(replaced, baseline, lost, missing, initialised):
    state = without(baseline, *((lost,) if isinstance(lost, str) else lost))
    report = adapt_state_dict(replaced(), state)[1]
    assert (report.missing, report.initialised, report.left_over) == (missing, initialised, [])


def test_report_of_other_shapes(replaced, baseline):
    for block in ('layer2.5', 'layer2.2'):
        baseline[f'{block}.conv1.weight'] = torch.ones(8, 4, 3, 3)
    report = adapt_state_dict(replaced(), baseline)[1]
    assert report.mismatched == {f'{block}.conv1.weight': ((8, 4, 3, 3), (4, 4, 3, 3))
                                 for block in ('layer2.5', 'layer2.2')}


def test_report_str_has_four_lines(replaced, baseline):
    baseline['fc.weight'] = torch.ones(1)
    del baseline['layer2.5.conv1.weight']
    lines = str(adapt_state_dict(replaced(), baseline)[1]).splitlines()
    assert lines[0].startswith('loaded: ')
    assert lines[1:] == ['used for initialisation: 3 removed blocks: layer1.1, layer2.2, layer2.3',
                         'missing: layer2.5.conv1.weight', 'left over: fc.weight']
