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
A, B = 0.75, -0.5


@pytest.fixture
def replaced(toy_net):
    def build(pretrained: str = 'average') -> nn.Module:
        net = toy_net()
        plan = dict(type='Blocks', blocks=BLOCKS)
        replace_blocks_(net, dict(plan=plan, fusion=dict(pretrained=pretrained)))
        return net
    return build


@pytest.fixture
def baseline(toy_net, randomise_) -> dict[str, Tensor]:
    """State dict of a baseline with random weights, whose block layer2.2 is A·layer2.1 + B·layer2.4."""
    state = randomise_(toy_net()).state_dict()
    for name, _ in toy_net().layer2[2].named_parameters():
        state[f'layer2.2.{name}'] = A * state[f'layer2.1.{name}'] + B * state[f'layer2.4.{name}']
    return state


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


# torch's own load_state_dict

def test_load_state_dict_baseline_is_accepted_strictly(replaced, baseline):
    result = replaced().load_state_dict(baseline, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


def test_load_state_dict_baseline_loads_all_kept_tensors_and_buffers(replaced, baseline):
    net = replaced()
    net.load_state_dict(baseline)
    own = {key: value for key, value in net.state_dict().items() if not key.endswith('coeff')}
    assert all(torch.equal(value, baseline[key]) for key, value in own.items())


def test_load_state_dict_baseline_average_starts_at_one_half(replaced, baseline):
    net = replaced('average')
    with torch.no_grad():
        net.layer2[2].coeff.fill_(3)
    net.load_state_dict(baseline)
    assert net.layer2[2].coeff.tolist() == [0.5, 0.5]


def test_load_state_dict_baseline_least_squares_recovers_planted_coefficients(replaced, baseline):
    net = replaced('least_squares')
    net.load_state_dict(baseline)
    torch.testing.assert_close(net.layer2[2].coeff.detach(), torch.tensor([A, B]), rtol=1e-6, atol=1e-6)


def test_load_state_dict_baseline_planted_block_has_the_baselines_outputs(replaced, baseline, toy_net):
    net, plain = replaced('least_squares').eval(), toy_net().eval()
    net.load_state_dict(baseline)
    plain.load_state_dict(baseline)
    x = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(net.layer2[2](x), plain.layer2[2](x), rtol=1e-5, atol=1e-5)


def test_load_state_dict_baseline_marks_the_norms_stale(replaced, baseline):
    net = replaced()
    net.load_state_dict(baseline)
    assert [layer.norm_stale for layer in computing_layers(net).values()] == [True] * 3


def test_load_state_dict_baseline_does_not_change_the_given_dict(replaced, baseline, assert_same_state):
    before = copy.deepcopy(baseline)
    replaced().load_state_dict(baseline)
    assert_same_state(baseline, before)


def test_load_state_dict_own_leaves_coefficients_as_saved(replaced, randomise_):
    source, target = randomise_(replaced()), replaced('least_squares')
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target.layer2[2].coeff, source.layer2[2].coeff)


def test_load_state_dict_own_norms_are_not_stale(replaced, baseline):
    net = replaced()
    own = copy.deepcopy(net.state_dict())
    net.load_state_dict(baseline)
    net.load_state_dict(own)
    assert [layer.norm_stale for layer in computing_layers(net).values()] == [False] * 3


def test_load_state_dict_baseline_without_a_removed_block_raises_when_strict(replaced, baseline):
    without = {key: value for key, value in baseline.items() if not key.startswith('layer2.2.')}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "layer2.2.coeff"'):
        replaced().load_state_dict(without)


def test_load_state_dict_layers_without_fit_are_not_stale(replaced, baseline):
    net = replaced()
    net.load_state_dict({key: value for key, value in baseline.items() if not key.startswith('layer2.2.')},
                        strict=False)
    assert [layer.norm_stale for layer in computing_layers(net).values()] == [True, False, True]


def test_load_state_dict_into_a_deepcopy_initialises_the_copy(replaced, baseline):
    net = replaced('least_squares')
    twin = copy.deepcopy(net)
    twin.load_state_dict(baseline)
    torch.testing.assert_close(twin.layer2[2].coeff.detach(), torch.tensor([A, B]))
    assert net.layer2[2].coeff.tolist() == [0.5, 0.5]


def test_load_state_dict_into_a_part_of_a_larger_model(replaced, baseline):
    whole = nn.ModuleDict({'net': replaced('least_squares'), 'head': nn.Linear(2, 2)})
    whole.load_state_dict(with_prefix(baseline, 'net.') | with_prefix(nn.Linear(2, 2).state_dict(), 'head.'))
    torch.testing.assert_close(whole['net'].layer2[2].coeff.detach(), torch.tensor([A, B]))


# mmengine's load_checkpoint, which walks the modules one by one

def test_load_checkpoint_baseline_initialises_the_coefficients(replaced, baseline, tmp_path):
    torch.save(dict(state_dict=baseline), tmp_path / 'base.pth')
    net = replaced('least_squares')
    load_checkpoint(net, str(tmp_path / 'base.pth'), map_location='cpu', strict=True)
    torch.testing.assert_close(net.layer2[2].coeff.detach(), torch.tensor([A, B]))
    assert torch.equal(net.layer2[4].conv1.weight, baseline['layer2.4.conv1.weight'])


def test_load_checkpoint_own_leaves_coefficients_as_saved(replaced, randomise_, tmp_path):
    source, target = randomise_(replaced()), replaced('least_squares')
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'own.pth')
    load_checkpoint(target, str(tmp_path / 'own.pth'), map_location='cpu', strict=True)
    assert torch.equal(target.layer2[2].coeff, source.layer2[2].coeff)
    assert not target.layer2[2].norm_stale


# The backbone's init_cfg, and a whole detector

BACKBONE = dict(depth=50, base_channels=4, norm_eval=True)
REPLACEMENT = dict(plan=dict(type='EveryKth', k=4), fusion=dict(pretrained='least_squares'))
BACKBONE_LAYERS = {'layer1.1', 'layer2.1', 'layer3.1', 'layer4.1'}


@pytest.fixture
def resnet(randomise_) -> dict[str, Tensor]:
    """State dict of a small R-50 with random weights, whose block layer3.1 is A·layer3.0 + B·layer3.2."""
    net = randomise_(MODELS.build(dict(type='ResNet', **BACKBONE)))
    state = net.state_dict()
    for name, _ in net.layer3[1].named_parameters():
        state[f'layer3.1.{name}'] = B * state[f'layer3.2.{name}']
        if name != 'conv1.weight':  # that of layer3.0 has another shape
            state[f'layer3.1.{name}'] += A * state[f'layer3.0.{name}']
    return state


def assert_initialised(backbone: nn.Module, state: dict[str, Tensor]) -> None:
    """Kept tensors and buffers are the checkpoint's, the planted (a, b) is found, all norms are stale."""
    own = {key: value for key, value in backbone.state_dict().items() if not key.endswith('coeff')}
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    torch.testing.assert_close(backbone.layer3[1].coeff.detach(), torch.tensor([A, B]), rtol=1e-5, atol=1e-5)
    assert {name for name, layer in computing_layers(backbone).items() if layer.norm_stale} == BACKBONE_LAYERS


@pytest.mark.parametrize('prefix', [None, 'backbone.'])
def test_init_cfg_pretrained_initialises_the_backbone(resnet, tmp_path, prefix):
    torch.save(dict(state_dict=with_prefix(resnet, prefix or '')), tmp_path / 'base.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    if prefix is not None:
        init_cfg['prefix'] = prefix
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


def test_load_checkpoint_whole_detector_initialises_the_backbone(resnet, tmp_path):
    state = detector(dict(type='ResNet')).state_dict() | with_prefix(resnet, 'backbone.')
    torch.save(dict(state_dict=state), tmp_path / 'detector.pth')
    model = detector(dict(type='RLResNet', replacement=REPLACEMENT))
    load_checkpoint(model, str(tmp_path / 'detector.pth'), map_location='cpu', strict=True)
    assert_initialised(model.backbone, resnet)


def test_load_checkpoint_whole_detector_loads_neck_and_head(resnet, randomise_, tmp_path):
    state = randomise_(detector(dict(type='ResNet'))).state_dict()
    torch.save(dict(state_dict=state), tmp_path / 'detector.pth')
    model = detector(dict(type='RLResNet', replacement=REPLACEMENT))
    load_checkpoint(model, str(tmp_path / 'detector.pth'), map_location='cpu', strict=True)
    for key, value in model.state_dict().items():
        assert key.startswith('backbone.') or torch.equal(value, state[key]), key


def test_load_checkpoint_whole_detector_own_file_leaves_coefficients_as_saved(randomise_, tmp_path):
    source, target = (detector(dict(type='RLResNet', replacement=REPLACEMENT)) for _ in range(2))
    torch.save(dict(state_dict=randomise_(source).state_dict()), tmp_path / 'own.pth')
    load_checkpoint(target, str(tmp_path / 'own.pth'), map_location='cpu', strict=True)
    assert torch.equal(target.backbone.layer3[1].coeff, source.backbone.layer3[1].coeff)
    assert not any(layer.norm_stale for layer in computing_layers(target).values())


# adapt_state_dict and its report

def test_adapt_baseline_gives_the_replaced_models_keys(replaced, baseline):
    net = replaced()
    assert set(adapt_state_dict(net, baseline)[0]) == set(net.state_dict())


def test_adapt_own_state_dict_passes_unchanged(replaced, randomise_, assert_same_state):
    net = randomise_(replaced())
    state = dict(net.state_dict())
    assert_same_state(adapt_state_dict(net, state)[0], state)


def test_adapt_does_not_change_the_given_dict(replaced, baseline, assert_same_state):
    before = copy.deepcopy(baseline)
    adapt_state_dict(replaced(), baseline)
    assert_same_state(baseline, before)


def test_adapt_does_not_change_the_model(replaced, baseline, assert_same_state):
    net = replaced()
    before = copy.deepcopy(net.state_dict())
    adapt_state_dict(net, baseline)
    assert_same_state(net.state_dict(), before)


def test_adapt_with_prefix_leaves_other_keys_alone(replaced, baseline):
    other = torch.ones(1)
    given = with_prefix(baseline, 'net.') | {'head.weight': other}
    state, report = adapt_state_dict(replaced(), given, 'net.')
    assert state['head.weight'] is other
    assert (report.missing, report.left_over) == ([], [])


def test_report_baseline_loaded_is_everything_the_model_has(replaced, baseline):
    net = replaced()
    assert set(adapt_state_dict(net, baseline)[1].loaded) == set(net.state_dict())


def test_report_baseline_fits_are_the_computing_layers(replaced, baseline):
    assert list(adapt_state_dict(replaced(), baseline)[1].fits) == LAYERS


def test_report_baseline_fit_has_the_residual(replaced, baseline):
    fits = adapt_state_dict(replaced('least_squares'), baseline)[1].fits
    assert fits['layer2.2'].residual < 1e-6
    assert fits['layer2.3'].residual > 0.1


def test_report_own_state_dict_has_no_fits(replaced):
    net = replaced()
    assert adapt_state_dict(net, net.state_dict())[1].fits == {}


def test_report_missing_kept_tensor_is_listed(replaced, baseline):
    del baseline['layer2.5.conv1.weight']
    assert adapt_state_dict(replaced(), baseline)[1].missing == ['layer2.5.conv1.weight']


def test_report_missing_batch_counter_is_no_matter(replaced, baseline):
    del baseline['layer2.5.norm1.num_batches_tracked']
    assert adapt_state_dict(replaced(), baseline)[1].missing == []


def test_report_missing_neighbour_tensor_is_listed_and_the_rest_fitted(replaced, baseline):
    del baseline['layer2.4.conv1.weight']
    report = adapt_state_dict(replaced(), baseline)[1]
    assert list(report.fits) == LAYERS
    assert report.missing == ['layer2.4.conv1.weight']


def test_report_incomplete_removed_block_is_fitted_to_what_there_is(replaced, baseline):
    del baseline['layer2.2.conv1.weight']
    report = adapt_state_dict(replaced('least_squares'), baseline)[1]
    torch.testing.assert_close(report.fits['layer2.2'].parameters['coeff'], torch.tensor([A, B]))
    assert (report.missing, report.left_over) == ([], [])


def test_report_absent_removed_block_is_missing(replaced, baseline):
    state = {key: value for key, value in baseline.items()
             if not key.startswith('layer2.2.') or 'running' in key}
    report = adapt_state_dict(replaced(), state)[1]
    assert list(report.fits) == ['layer1.1', 'layer2.3']
    assert report.missing == ['layer2.2.coeff']


def test_report_unknown_key_is_left_over(replaced, baseline):
    baseline['fc.weight'] = torch.ones(1)
    assert adapt_state_dict(replaced(), baseline)[1].left_over == ['fc.weight']


def test_report_other_shape_is_mismatched(replaced, baseline):
    baseline['layer2.5.conv1.weight'] = torch.ones(8, 4, 3, 3)
    report = adapt_state_dict(replaced(), baseline)[1]
    assert report.mismatched == {'layer2.5.conv1.weight': ((8, 4, 3, 3), (4, 4, 3, 3))}


def test_report_removed_tensor_of_other_shape_does_not_enter_the_fit(replaced, baseline):
    baseline['layer2.2.conv1.weight'] = torch.ones(8, 4, 3, 3)
    report = adapt_state_dict(replaced('least_squares'), baseline)[1]
    torch.testing.assert_close(report.fits['layer2.2'].parameters['coeff'], torch.tensor([A, B]))


def test_report_str_has_the_four_lines(replaced, baseline):
    baseline['fc.weight'] = torch.ones(1)
    del baseline['layer2.5.conv1.weight']
    lines = str(adapt_state_dict(replaced(), baseline)[1]).splitlines()
    titles = [line.split(':')[0] for line in lines]
    assert titles == ['loaded', 'used for initialisation', 'missing', 'left over']
    assert lines[1].startswith('used for initialisation: 3 removed blocks: layer1.1 (a, b) = [0.5, 0.5]')
    assert lines[2:] == ['missing: layer2.5.conv1.weight', 'left over: fc.weight']


def test_load_logs_the_report(replaced, baseline, caplog):
    with caplog.at_level('INFO', logger='rl_mmdet'):
        replaced().load_state_dict(baseline)
    assert 'used for initialisation: 3 removed blocks' in caplog.text
