"""``fold_norm=True`` of every kind of RL backbone: same outputs, gradients and state, about half is kept."""
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from rl_mmdet.analysis import saved_bytes
from rl_mmdet.folding.fold_norm import FoldedSyncBatchNorm, FoldingConv2d
from rl_mmdet.models import RLBackbone, RLResNet, RLSwin, RLViT
from rl_mmdet.replacement import computing_layers, materialize

EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2))
TINY = dict(depth=50, base_channels=4)
SPLIT = dict(depth=50, base_channels=8, stem_channels=8)
BACKBONES = {
    'RLResNet': dict(type='RLResNet', **TINY),
    'RLResNet_frozen': dict(type='RLResNet', **TINY, frozen_stages=1),
    'RLResNet_caffe': dict(type='RLResNet', **TINY, style='caffe', norm_cfg=dict(type='BN', requires_grad=False)),
    'RLResNet_with_cp': dict(type='RLResNet', **TINY, with_cp=True),
    'RLResNet_sync': dict(type='RLResNet', **TINY, norm_cfg=dict(type='SyncBN')),
    'RLResNet_dcn': dict(type='RLResNet', **TINY, dcn=dict(type='DCNv2', deform_groups=1),
                         stage_with_dcn=(False, False, True, False)),
    'RLResNetV1d': dict(type='RLResNetV1d', **TINY),
    'RLResNeXt': dict(type='RLResNeXt', **TINY, groups=2, base_width=4),
    'Res2Net': dict(type='RLBackbone', backbone='Res2Net', **SPLIT, scales=2, base_width=4),
    'HRNet': dict(type='RLBackbone', backbone='HRNet', norm_eval=True, extra={
        f'stage{i + 1}': dict(num_modules=1, num_branches=i + 1, block='BOTTLENECK' if i == 0 else 'BASIC',
                              num_blocks=(3,) * (i + 1), num_channels=(4, 4, 8, 8)[:i + 1]) for i in range(4)}),
    'timm_resnet18': dict(type='RLBackbone', timm='resnet18', channels=(4, 8, 8, 16), norm_eval=True),
}
FOLDS = {'RLResNetV1d': 55, 'Res2Net': 55, 'RLResNet_dcn': 47, 'HRNet': None, 'timm_resnet18': 21}
"""Of how many convolutions; 53 where it isn't said, some where it is None."""
CAN_BE_REPLACED = sorted(set(BACKBONES) - {'timm_resnet18'})


@pytest.fixture
def build(randomise_, in_mode) -> Callable[..., nn.Module]:
    """A backbone in train mode with the same numbers at every call."""
    def make(name: str, **more: Any) -> nn.Module:
        torch.manual_seed(0)
        return in_mode(randomise_(MODELS.build(copy.deepcopy(dict(BACKBONES[name], **more)))), True)
    return make


def results(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Outputs, and the gradient of everything that has one."""
    image = image.clone().requires_grad_()
    outs = model(image)
    sum((out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outs).backward()
    found = {f'out{i}': out.detach() for i, out in enumerate(outs)} | {'image': image.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm() + 1e-14, name


def folding(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FoldingConv2d)]


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize('name', BACKBONES)
def test_outputs_gradients_and_keys(build, image, name):
    plain, folded = build(name).double(), build(name, fold_norm=True).double()
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert not folding(plain)
    assert len(folding(folded)) == (FOLDS.get(name, 53) or len(folding(folded)) or -1)
    assert_equal(results(folded, image), results(plain, image))


@pytest.mark.parametrize('mode', ['detached', 'coupled'])
@pytest.mark.parametrize('name', CAN_BE_REPLACED)
def test_with_replaced_blocks(build, image, name, mode):
    replacement = dict(EVERY_SECOND, gradient=dict(mode=mode))
    plain = build(name, replacement=replacement).double()
    folded = build(name, replacement=replacement, fold_norm=True).double()
    inside = tuple(f'{layer}.' for layer in computing_layers(folded))
    assert [conv for conv in folding(folded) if conv.startswith(inside)]
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert_equal(results(folded, image), results(plain, image))


def test_detectors_second_way_forward(image):
    """``rfp_forward``, also of replaced blocks: it is traced, too."""
    found = []
    for fold_norm in (False, True):
        torch.manual_seed(0)
        model = RLBackbone('DetectoRS_ResNet', **TINY, rfp_inplanes=4, norm_eval=True, replacement=EVERY_SECOND,
                           fold_norm=fold_norm).double()
        model.train()
        features = [torch.ones(1, 4, 32 // stride, 64 // stride).double() for stride in (4, 8, 16, 32)]
        sum(out.square().sum() for out in model.rfp_forward(image, features)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(folding(model)) == 53
    assert_equal(*found)


@pytest.mark.parametrize('name', ['RLResNet', 'Res2Net'])
def test_with_a_sampled_gradient_it_trains(build, image, name):
    """The draws are the same ones: replaced blocks keep their own way, kept ones don't draw."""
    found = []
    for fold_norm in (False, True):
        model = build(name, replacement=dict(EVERY_SECOND, gradient=dict(sample=1 / 8)), fold_norm=fold_norm).double()
        torch.manual_seed(5)
        found.append(results(model, image))
        torch.optim.SGD(model.parameters(), lr=1e-9).step()
        found[-1] |= {f'after step: {key}': value.detach() for key, value in model.named_parameters()}
    assert folding(model)
    assert_equal(*found)


def test_about_half_is_kept(in_mode):
    kept = []
    for fold_norm in (False, True):
        model = in_mode(RLResNet(50, norm_eval=True, frozen_stages=1, fold_norm=fold_norm), True)
        kept.append(saved_bytes(model, lambda model=model: model(torch.zeros(1, 3, 128, 128))))
    assert 0.4 * kept[0] < kept[1] < 0.6 * kept[0]


def test_initial_weights_are_the_same():
    """MMEngine's initialisers find layers by the names of their classes and direct bases."""
    states = []
    for fold_norm in (False, True):
        torch.manual_seed(0)
        model = RLResNet(**TINY, fold_norm=fold_norm, init_cfg=[
            dict(type='Kaiming', layer='Conv2d'), dict(type='Constant', val=3, layer=['_BatchNorm', 'GroupNorm'])])
        model.init_weights()
        states.append(model.state_dict())
    assert states[0]['bn1.weight'].unique().tolist() == [3]
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


def test_sync_batch_norm_of_a_config_is_folded(build):
    model = build('RLResNet_sync', fold_norm=True)
    assert type(model.layer1[0].bn1) is FoldedSyncBatchNorm
    assert type(materialize(model).layer1[0].bn1) is type(build('RLResNet_sync').layer1[0].bn1)


def test_materialize_gives_the_plain_backbone(build, image):
    model = build('RLResNet', replacement=EVERY_SECOND, fold_norm=True).double()
    plain = materialize(model)
    assert {type(module) for module in plain.modules() if isinstance(module, nn.Conv2d)} == {nn.Conv2d}
    assert_equal({str(i): out for i, out in enumerate(plain(image))},
                 {str(i): out for i, out in enumerate(model(image))})


@pytest.mark.parametrize('model', [
    lambda: RLResNet(**TINY, norm_eval=False, fold_norm=True),
    lambda: RLBackbone('CSPDarknet', widen_factor=0.125, fold_norm=True),
    lambda: RLBackbone(timm='resnet18', fold_norm=True)], ids=['RLResNet', 'CSPDarknet', 'timm'])
def test_norms_that_train_raise(model):
    with pytest.raises(ValueError, match=r'fold_norm=True with norm_eval=False, but BatchNorm that trains can\'t be '
                                         r'folded; set norm_eval=True or leave fold_norm out$'):
        model()


@pytest.mark.parametrize('model', [
    lambda: RLSwin(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), fold_norm=True),
    lambda: RLViT(dict(embed_dim=48, depth=2, num_heads=3), img_size=64, norm_eval=True, fold_norm=True),
    lambda: RLBackbone('PyramidVisionTransformer', embed_dims=8, num_layers=[1] * 4, num_heads=[1] * 4, fold_norm=True),
    lambda: RLResNet(**TINY, norm_cfg=dict(type='GN', num_groups=2), fold_norm=True)], ids=['Swin', 'ViT', 'PVT', 'GN'])
def test_nothing_to_fold_raises(model):
    with pytest.raises(ValueError, match='has no ordinary convolution .* nothing to fold; leave fold_norm out$'):
        model()
