"""``fold_norm=True`` of every kind of RL backbone: same outputs, gradients and state, and less is kept for backward."""
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rl_mmdet.analysis import saved_bytes
from rl_mmdet.folding import unfold_norm_
from rl_mmdet.models import RLResNet, build_rl_backbone
from rl_mmdet.replacement import materialize

TINY = dict(depth=50, base_channels=4)
SAMPLE = ('frozen_stages', 'with_cp', 'sync_bn', 'Res2Net', 'timm_resnet')
MORE = ('RLResNet', 'caffe', 'dcn_v2', 'RLResNetV1d', 'RLResNeXt', 'HRNet', 'RegNet')
"""Names of cases in conftest.py, the second ones ``slow``."""


@pytest.fixture
def build(cases, randomise_, in_mode) -> Callable[..., nn.Module]:
    """A backbone in float64 and in train mode, with the same numbers at every call."""
    def make(name: str, mode: str | None = None, **more: Any) -> nn.Module:
        case = cases[name]
        model = case.build_unreplaced(norm_eval=True, **more) if mode is None else case.build(
            mode, norm_eval=True, **more)
        return in_mode(randomise_(model), True).double()
    return make


@pytest.mark.parametrize(('recompute', 'with_cp'), [(True, False), (None, True)])
def test_blocks_of_which_a_part_is_replaced_are_run_again_with_the_same_gradients(randomise_, recompute, with_cp):
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)

    def found(recompute: bool | None = None, **settings: bool) -> dict[str, Tensor]:
        model = randomise_(RLResNet(**TINY, norm_eval=True, **settings, replacement=dict(
            plan=dict(type='EveryKth', k=2), operator=dict(type='FullBlock', only='conv2'),
            gradient=dict(every=1, recompute=recompute)))).double()
        model.train()  # mmdet's returns None
        return results(model, image)

    torch.testing.assert_close(found(recompute, with_cp=with_cp, fold_norm=True), found())


def results(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Outputs, and the gradient of everything that has one."""
    image = image.clone().requires_grad_()
    outs = model(image)
    sum((out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outs).backward()
    found = {f'out{i}': out.detach() for i, out in enumerate(outs)} | {'image': image.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-10 * value.norm() + 1e-14, name


def kept_for_an_image(forward: Callable[[int], Any], model: nn.Module) -> int:
    """Bytes that each image more adds: not the folded weights, which are the same for all."""
    one, two = (saved_bytes(model, partial(forward, batch)) for batch in (1, 2))
    return two - one


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize('mode', [None, 'detached', 'coupled'])
@pytest.mark.parametrize('name', [*SAMPLE, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_outputs_gradients_and_keys_are_the_same_and_less_is_kept(build, image, name, mode):
    """Without replacement (None), and with replaced blocks in both gradient modes."""
    plain, folded = build(name, mode), build(name, mode, fold_norm=True)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert_equal(results(folded, image), results(plain, image))
    if name != 'with_cp':
        kept = [kept_for_an_image(lambda batch, model=model: model(image.repeat(batch, 1, 1, 1)), model)
                for model in (plain, folded)]
        assert kept[1] < 0.9 * kept[0]


def test_about_half_is_kept(in_mode):
    kept = []
    for fold_norm in (False, True):
        model = in_mode(RLResNet(50, norm_eval=True, frozen_stages=1, fold_norm=fold_norm), True)
        kept.append(kept_for_an_image(lambda batch, model=model: model(torch.zeros(batch, 3, 64, 64)), model))
    assert 0.4 * kept[0] < kept[1] < 0.6 * kept[0]


class Calls(TorchDispatchMode):
    """Counts tensor operations, of which views cost nothing on a GPU."""
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += not func.is_view and func.__name__ not in ('empty.memory_format', '_unsafe_view.default')
        return func(*args, **(kwargs or {}))


def test_about_as_many_kernels_are_launched(build, image):
    counts = []
    for fold_norm in (False, True):
        model = build('frozen_stages', fold_norm=fold_norm)
        with Calls() as calls:
            sum(out.sum() for out in model(image)).backward()
        counts.append(calls.count)
    assert counts[1] < 1.4 * counts[0]


def test_detectors_second_way_forward(randomise_, image):
    """``rfp_forward``, also of replaced blocks, is folded, too."""
    features = [torch.ones(1, 4, 32 // stride, 64 // stride).double() for stride in (4, 8, 16, 32)]
    kept, gradients = [], []
    for fold_norm in (False, True):
        model = randomise_(build_rl_backbone('DetectoRS_ResNet', **TINY, rfp_inplanes=4, norm_eval=True,
                                             fold_norm=fold_norm, replacement=dict(
                                                 plan=dict(type='EveryKth', k=2), gradient=dict(every=1))))
        model.double().train()
        kept.append(kept_for_an_image(lambda batch, model=model: model.rfp_forward(
            image.repeat(batch, 1, 1, 1), [feature.repeat(batch, 1, 1, 1) for feature in features]), model))
        sum(out.square().sum() for out in model.rfp_forward(image, features)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_equal(*gradients)
    assert kept[1] < 0.9 * kept[0]


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


@pytest.mark.parametrize('name', ['frozen_stages', 'sync_bn'])
def test_materialized_and_unfolded_it_is_the_plain_backbone(build, image, name):
    model = build(name, 'detached', fold_norm=True)
    plain = materialize(model)
    unfold_norm_(plain)
    assert [type(module) for module in plain.modules()] == [type(module) for module in build(name).modules()]
    assert_equal(dict(enumerate(plain(image))), dict(enumerate(model(image))))


@pytest.mark.parametrize('cfg', [
    dict(backbone='ResNet', **TINY, norm_eval=False), dict(backbone='CSPDarknet', widen_factor=0.125),
    dict(timm='resnet18')], ids=['RLResNet', 'CSPDarknet', 'timm'])
def test_norms_that_train_raise(cfg):
    with pytest.raises(ValueError, match=r'fold_norm=True with norm_eval=False, but BatchNorm that trains can\'t be '
                                         r'folded; set norm_eval=True or leave fold_norm out$'):
        build_rl_backbone(**cfg, fold_norm=True)


@pytest.mark.parametrize('cfg', [
    dict(backbone='SwinTransformer', embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4)),
    dict(backbone='RLViT', arch=dict(embed_dim=48, depth=2, num_heads=3), img_size=64, norm_eval=True),
    dict(backbone='PyramidVisionTransformer', embed_dims=8, num_layers=[1] * 4, num_heads=[1] * 4),
    dict(backbone='ResNet', **TINY, norm_cfg=dict(type='GN', num_groups=2))], ids=['Swin', 'ViT', 'PVT', 'GN'])
def test_nothing_to_fold_raises(cfg):
    with pytest.raises(ValueError, match='has no ordinary convolution .* nothing to fold; leave fold_norm out$'):
        build_rl_backbone(**cfg, fold_norm=True)
