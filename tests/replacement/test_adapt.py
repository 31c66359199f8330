"""Shape adaptation of whole backbones: blocks at the ends of stages live as all others do."""
import copy
import math

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

import rl_mmdet.models  # noqa: F401  registers the RL backbones
from rl_mmdet.replacement import adapt_state_dict, computing_layers, materialize

RESNET = dict(type='ResNet', depth=50, base_channels=4)
SWIN = dict(type='SwinTransformer', embed_dims=8, depths=(2, 2, 6, 2), num_heads=(2, 2, 4, 4), window_size=4)
PLACES = {
    'first': (RESNET, {'layer2': [0]}),  # with stride and downsample
    'both_ends': (RESNET, {'layer1': [0], 'layer4': [2]}),
    'a_whole_stage': (RESNET, {'layer3': [0, 1, 2, 3, 4, 5]}),
    'swin': (SWIN, {'stages.0.blocks': [0, 1], 'stages.1.blocks': [0]}),
}
everywhere = pytest.mark.parametrize(('cfg', 'blocks'), PLACES.values(), ids=PLACES)


def build(cfg: dict, blocks: dict | None = None, adapt: bool = True, mode: str = 'detached', **fusion) -> nn.Module:
    """The same weights at every call; ``blocks`` replaced by ``RL...``, the unmodified class without them."""
    torch.manual_seed(0)
    if blocks is None:
        return MODELS.build(copy.deepcopy(cfg))
    replacement = dict(plan=dict(type='Blocks', blocks=blocks), fusion=dict(adapt=adapt, **fusion),
                       gradient=dict(mode=mode, every=1))
    name = {'ResNet': 'RLResNet', 'SwinTransformer': 'RLSwin'}[cfg['type']]
    return MODELS.build(dict(copy.deepcopy(cfg), type=name, replacement=replacement))


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@pytest.fixture
def picture() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@everywhere
def test_materialized_is_the_baseline_and_computes_the_same(cfg, blocks, randomise_, picture):
    model, baseline = randomise_(build(cfg, blocks)), build(cfg)
    for net in (model, plain := materialize(model), baseline):
        net.train(False)  # mmdet's return None
    assert shapes(plain.state_dict()) == shapes(baseline.state_dict())
    for actual, made, expected in zip(*(net(picture) for net in (model, plain, baseline)), strict=True):
        torch.testing.assert_close(actual, made, rtol=1e-4, atol=1e-4)
        assert actual.shape == expected.shape


@pytest.mark.parametrize(('cfg', 'blocks', 'fusion'), [
    *((*place, 'ScalarFusion') for place in PLACES.values()), (*PLACES['both_ends'], 'TransformFusion'),
    (*PLACES['swin'], 'TransformFusion')], ids=range(6))
def test_baselines_state_dict_fits(cfg, blocks, fusion, randomise_):
    model = build(cfg, blocks, type=fusion)
    adapted, report = adapt_state_dict(model, randomise_(build(cfg)).state_dict())
    assert (report.missing, report.left_over, report.mismatched) == ([], [], {})
    assert set(report.initialised) == set(computing_layers(model))
    model.load_state_dict(adapted)


@everywhere
def test_one_step_gives_finite_gradients_to_all_that_learns(cfg, blocks, picture):
    model = build(cfg, blocks, mode='coupled')
    model.train()
    sum(out.square().mean() for out in model(picture)).backward()
    for name, layer in computing_layers(model).items():
        assert torch.isfinite(layer.coeff.grad).all(), name
        assert layer.coeff.grad.any(), name


def test_made_weights_are_the_average_of_the_resized_neighbours():
    model = build(RESNET, {'layer2': [0], 'layer4': [2]})
    before, after = model.layer1[2].conv1.weight, model.layer2[1].conv1.weight  # 4 of 16 channels, and 8 of 32
    expected = before[torch.arange(8) // 2] / 2 + after[:, torch.arange(16) * 2] * math.sqrt(32 / 16) / 2
    torch.testing.assert_close(model.layer2[0].weights()['conv1.weight'], expected)
    torch.testing.assert_close(model.layer4[2].weights()['conv3.weight'], model.layer4[1].conv3.weight / 2)


def test_a_copy_points_into_itself_across_the_border():
    twin = copy.deepcopy(build(RESNET, {'layer2': [0]}))
    assert twin.layer2[0].kept[:2] == (twin.layer1[2], twin.layer2[1])


def test_report_names_the_blocks_of_other_stages():
    lines = str(build(RESNET, {'layer2': [0]}).replacement_report).splitlines()
    [line] = [line for line in lines if line.strip().startswith('layer2.0 ')]
    assert 'from layer1.2 and layer2.1; tensors of another size there from layer1.0 and layer3.0' in line


def test_interior_blocks_are_made_alike_without(randomise_, picture):
    nets = [randomise_(build(RESNET, {'layer3': [2]}, adapt=adapt)) for adapt in (True, False)]
    for one, other in zip(*(net(picture) for net in nets), strict=True):
        assert torch.equal(one, other)
