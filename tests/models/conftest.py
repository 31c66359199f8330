"""Every backbone class, as small as it goes. The tests that hold for all of them run over a fixed sample, and over all
where ``slow`` is selected."""
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from mmcv.cnn.bricks.conv_ws import ConvAWS2d
from mmdet.models.backbones import Darknet, EfficientNet
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.registry import MODELS
from torch import Tensor, nn

from rl_mmdet.models import TimmBackbone

EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2))


@dataclass(frozen=True)
class Case:
    """A backbone's config and what is known of it.

    Args:
        baseline: config of the unmodified backbone.
        rl: config of ours, to which ``replacement`` is added.
        replaced: the blocks that ``EveryKth(k=2)`` replaces.
        odd: height and width of an image that the baseline takes although no stride divides it, where there is one.
        frozen: arguments that freeze stages and norms; None if the class has none.
        with_cp: whether the class can checkpoint activations.
    """
    baseline: dict[str, Any]
    rl: dict[str, Any]
    replaced: dict[str, list[int]]
    odd: tuple[int, int] = (75, 101)
    frozen: dict[str, Any] | None = None
    with_cp: bool = False

    def build_baseline(self, **more: Any) -> nn.Module:
        return _build(dict(self.baseline, **more))

    def build_unreplaced(self, **more: Any) -> nn.Module:
        return _build(dict(self.rl, replacement=None, **more))

    def build(self, mode: str = 'detached', fusion: dict[str, Any] | None = None,
              operator: dict[str, Any] | None = None, start: dict[str, Any] | None = None, **more: Any) -> nn.Module:
        replacement = dict(EVERY_SECOND, fusion=fusion, operator=operator, gradient=dict(mode=mode, every=1),
                           start=start)
        return _build(dict(self.rl, replacement=replacement, **more))


def _build(cfg: dict[str, Any]) -> nn.Module:
    """The same weights at every call; mmdet takes settings out of the dicts it is given: it gets copies."""
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg))
    _complete_(model)
    return model


@torch.no_grad()
def _complete_(model: nn.Module) -> None:
    """Give sensible numbers to what mmdet's classes and mmcv's convolutions leave to a checkpoint."""
    for module in model.modules():
        if isinstance(module, TridentConv) and module.weight is not None:
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, ConvAWS2d):
            module.weight_gamma.fill_((module.in_channels * math.prod(module.kernel_size)) ** -0.5)


def own(name: str, parent: str | type, kwargs: dict[str, Any], replaced: dict[str, list[int]], **more: Any) -> Case:
    """A backbone that has an RL class of its own."""
    return Case(dict(kwargs, type=parent), dict(kwargs, type=name), replaced, **more)


def of_mmdet(kind: str | type, kwargs: dict[str, Any], replaced: dict[str, list[int]], **more: Any) -> Case:
    cfg = dict(kwargs, type=kind)
    return Case(cfg, dict(type='RLBackbone', backbone=cfg), replaced, **more)


def of_timm(name: str, kwargs: dict[str, Any], replaced: dict[str, list[int]], **more: Any) -> Case:
    cfg = dict(kwargs, timm=name)
    return Case(dict(cfg, type=TimmBackbone), dict(cfg, type='RLBackbone'), replaced, with_cp=True, **more)


class NarrowEfficientNet(EfficientNet):
    """mmdet's has no argument for its width."""
    arch_settings = {'b0': (0.25, 1.0, 224)}


class NarrowDarknet(Darknet):
    """mmdet's has no argument for its width."""
    arch_settings = {53: ((1, 2, 3, 3, 2), ((32, 8), (8, 16), (16, 16), (16, 32), (32, 32)))}


def branches(block: str, *depths: int) -> dict[str, Any]:
    """One of HRNet's stages."""
    return dict(num_modules=1, num_branches=len(depths), block=block, num_blocks=depths,
                num_channels=(4, 8, 8, 8)[:len(depths)])


R50 = {'layer1': [1], 'layer2': [1], 'layer3': [1, 3], 'layer4': [1]}
CSP = {'stage1.1.blocks': [1], 'stage2.1.blocks': [1, 3], 'stage3.1.blocks': [1, 3], 'stage4.2.blocks': [1]}
BLOCKS = {'blocks': [1, 3]}
TINY = dict(depth=50, base_channels=4)
TINY_X = dict(depth=50, base_channels=4, groups=2, base_width=4)
SPLIT = dict(depth=50, base_channels=8, stem_channels=8)
SWIN = dict(embed_dims=16, depths=(2, 2, 6, 2), num_heads=(1, 2, 2, 4))
PVT = dict(embed_dims=8, num_layers=[2, 3, 3, 2], num_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2])
VIT = dict(embed_dim=48, num_heads=3)
HRNET = dict(stage1=branches('BOTTLENECK', 3), stage2=branches('BASIC', 3, 2), stage3=branches('BASIC', 2, 3, 2),
             stage4=branches('BASIC', 2, 2, 2, 3))
FROZEN = dict(frozen_stages=1, norm_eval=True)

CASES = {
    'RLResNet': own('RLResNet', 'ResNet', TINY, R50, frozen=FROZEN, with_cp=True),
    'RLResNet_34': own('RLResNet', 'ResNet', dict(TINY, depth=34), {
        'layer1': [1], 'layer2': [1], 'layer3': [1, 3], 'layer4': [1]}, frozen=FROZEN, with_cp=True),
    'RLResNetV1d': own('RLResNetV1d', 'ResNetV1d', TINY, R50, frozen=FROZEN, with_cp=True),
    'RLResNeXt': own('RLResNeXt', 'ResNeXt', TINY_X, R50, frozen=FROZEN, with_cp=True),
    'RLSwin': own('RLSwin', 'SwinTransformer', dict(SWIN, window_size=4), {'stages.2.blocks': [1, 3]},
                  frozen=dict(frozen_stages=2), with_cp=True),
    'RLSwin_window7': own('RLSwin', 'SwinTransformer', dict(SWIN, depths=(2, 4, 3, 2), window_size=7),
                          {'stages.1.blocks': [1], 'stages.2.blocks': [1]}, frozen=dict(frozen_stages=2), with_cp=True),
    'RLViT': Case(dict(VIT, type=TimmBackbone, timm='samvit_base_patch16', depth=6, img_size=64, window_size=2,
                       global_attn_indexes=(0, 2, 3, 5), use_rel_pos=True, neck_chans=0),
                  dict(type='RLViT', arch=dict(VIT, depth=6), img_size=64, window_size=2), BLOCKS,
                  frozen=dict(frozen_stages=1), with_cp=True),
    'timm_vit': of_timm('vit_tiny_patch16_224', dict(VIT, depth=6), BLOCKS, frozen=dict(frozen_stages=1)),
    'timm_eva02': of_timm('eva02_tiny_patch14_224', dict(VIT, depth=5), BLOCKS,
                           frozen=dict(frozen_stages=1)),
    'timm_dinov2': of_timm('vit_small_patch14_dinov2', dict(VIT, depth=5), BLOCKS,
                            frozen=dict(frozen_stages=1)),
    'timm_dinov3': of_timm('vit_small_patch16_dinov3', dict(VIT, depth=5), BLOCKS,
                            frozen=dict(frozen_stages=1)),
    'HRNet': of_mmdet('HRNet', dict(extra=HRNET), {
        'layer1': [1], 'stage2.0.branches.0': [1], 'stage3.0.branches.1': [1], 'stage4.0.branches.3': [1],
    }, odd=(96, 160), frozen=dict(norm_eval=True), with_cp=True),
    'RegNet': of_mmdet('RegNet', dict(arch=dict(w0=8, wa=4.5, wm=1.8, group_w=8, depth=12, bot_mul=1.0)), {
        'layer3': [1], 'layer4': [1, 3]}, frozen=FROZEN, with_cp=True),
    'CSPDarknet': of_mmdet('CSPDarknet', dict(widen_factor=0.125, deepen_factor=0.5), {
        'stage2.1.blocks': [1], 'stage3.1.blocks': [1]}, odd=(76, 100), frozen=dict(FROZEN, frozen_stages=2)),
    'CSPNeXt': of_mmdet('CSPNeXt', dict(widen_factor=0.125), CSP, frozen=FROZEN),
    'ResNeSt': of_mmdet('ResNeSt', dict(SPLIT, radix=2, reduction_factor=4), R50, frozen=FROZEN, with_cp=True),
    'Res2Net': of_mmdet('Res2Net', dict(SPLIT, scales=2, base_width=4), R50, frozen=FROZEN, with_cp=True),
    'PVT': of_mmdet('PyramidVisionTransformer', dict(PVT, pretrain_img_size=64),
                    {'layers.1.1': [1], 'layers.2.1': [1]}),
    'PVTv2': of_mmdet('PyramidVisionTransformerV2', PVT, {'layers.1.1': [1], 'layers.2.1': [1]}),
    'Darknet': of_mmdet(NarrowDarknet, dict(depth=53), {'conv_res_block3': [1], 'conv_res_block4': [1]},
                        frozen=dict(FROZEN, frozen_stages=3)),
    'MobileNetV2': of_mmdet('MobileNetV2', dict(widen_factor=0.25), {
        'layer3': [1], 'layer4': [1], 'layer5': [1], 'layer6': [1]}, frozen=dict(FROZEN, frozen_stages=3),
                            with_cp=True),
    'TridentResNet': of_mmdet('TridentResNet', dict(
        TINY, num_branch=3, test_branch_idx=1, trident_dilations=(1, 2, 3), num_stages=3, strides=(1, 2, 2),
        dilations=(1, 1, 1), out_indices=(2,)), {'layer1': [1], 'layer2': [1], 'layer3': [1, 3]}, frozen=FROZEN),
    'EfficientNet': of_mmdet(NarrowEfficientNet, dict(arch='b0'), {'layers.4': [1], 'layers.5': [1, 3]},
                             frozen=dict(FROZEN, frozen_stages=5), with_cp=True),
    'DetectoRS_ResNet': of_mmdet('DetectoRS_ResNet', dict(
        TINY, conv_cfg=dict(type='ConvAWS'), sac=dict(type='SAC', use_deform=False),
        stage_with_sac=(False, True, True, False)), R50, frozen=FROZEN, with_cp=True),
    'HourglassNet': of_mmdet('HourglassNet', dict(
        downsample_times=2, num_stacks=2, stage_channels=[8, 8, 12], stage_blocks=[2, 2, 4], feat_channel=8),
        {'hourglass_modules.0.low2.low2': [1], 'hourglass_modules.1.low2.low2': [1]}),
    'timm_convnext': of_timm('convnext_atto', dict(dims=(8, 16, 16, 32), depths=(2, 2, 6, 2)),
                             {'stages.2.blocks': [1, 3]}, frozen=FROZEN),
    'timm_swin': of_timm('swin_tiny_patch4_window7_224', dict(embed_dim=16, num_heads=(1, 2, 2, 4)),
                         {'layers.2.blocks': [1, 3]}, odd=(76, 100), frozen=FROZEN),
    'timm_regnet': of_timm('regnetx_002', {}, {'s3': [1], 's4': [1, 3, 5]},
                           frozen=dict(FROZEN, frozen_stages=3)),
    'timm_resnet': of_timm('resnet50', dict(channels=(4, 8, 8, 16)), R50, frozen=FROZEN),
    'timm_mobilenet': of_timm('mobilenetv3_small_050', {}, {'blocks.2': [1], 'blocks.4': [1]}, frozen=FROZEN),
}


def plugin(position: str, kind: str = 'ContextBlock', **more: Any) -> dict[str, Any]:
    return dict(cfg=dict(type=kind, **(more or dict(ratio=1 / 4))), position=position)


def resnet(name: str = 'ResNet', replaced: dict[str, list[int]] = R50, **more: Any) -> Case:
    kwargs = dict(TINY_X if name == 'ResNeXt' else TINY, **more)
    frozen = more.get('frozen_stages', 0)
    return own(f'RL{name}', name, kwargs, {stage: replaced[stage] for stage in replaced if int(stage[-1]) > frozen})


ATTENTION = plugin('after_conv2', 'GeneralizedAttention', spatial_range=-1, num_heads=2, attention_type='0010',
                   kv_stride=2)
DCN = dict(type='DCN', deform_groups=1)
GN = dict(type='GN', num_groups=2)
ARGUMENTS = {
    'depth_101': resnet(depth=101, replaced=R50 | {'layer3': list(range(1, 22, 2))}),
    'caffe': resnet(style='caffe', norm_cfg=dict(type='BN', requires_grad=False)),
    'in_channels': resnet(in_channels=3, stem_channels=6),
    'deep_stem': resnet(deep_stem=True),
    'avg_down': resnet(avg_down=True),
    'dcn': resnet(dcn=DCN, stage_with_dcn=(0, 1, 0, 0)),
    'dcn_v2': resnet(dcn=dict(DCN, type='DCNv2'), stage_with_dcn=(0, 1, 1, 1)),
    'plugin_after_conv1': resnet(plugins=[plugin('after_conv1')]),
    'plugin_after_conv3': resnet(plugins=[dict(plugin('after_conv3'), stages=(0, 1, 1, 0))]),
    'plugin_attention': resnet(plugins=[ATTENTION]),
    'plugin_nonlocal': resnet(plugins=[plugin('after_conv2', 'NonLocal2d', reduction=2)]),
    'frozen_stages': resnet(frozen_stages=1),
    'norm_train': resnet(norm_eval=False),
    'group_norm': resnet(norm_cfg=GN),
    'sync_bn': resnet(norm_cfg=dict(type='SyncBN')),
    'conv_ws': resnet(conv_cfg=dict(type='ConvWS'), norm_cfg=GN),
    'out_indices': resnet(out_indices=(1, 3)),
    'three_stages': resnet(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,),
                           replaced={key: R50[key] for key in ('layer1', 'layer2', 'layer3')}),
    'dilations': resnet(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    'no_zero_init': resnet(zero_init_residual=False),
    'with_cp': resnet(with_cp=True),
    'init_cfg': resnet(init_cfg=dict(type='Xavier', layer='Conv2d')),
    'detectors_deformable_sac': of_mmdet('DetectoRS_ResNet', dict(
        TINY, sac=dict(type='SAC', use_deform=True), stage_with_sac=(False, True, False, False)), R50),
    'v1d_frozen': resnet('ResNetV1d', frozen_stages=1),
    'resnext_dcn': resnet('ResNeXt', dcn=DCN, stage_with_dcn=(0, 1, 0, 0)),
    'resnext_plugin': resnet('ResNeXt', plugins=[plugin('after_conv3')]),
}
"""What the ResNets' arguments change in a block or around the chains."""
SAMPLE = ('RLResNet', 'RLResNet_34', 'RLSwin', 'RLViT', 'Res2Net', 'MobileNetV2', 'timm_convnext')
"""The mechanisms that every run of the tests covers; the other cases are ``slow``."""


def params(cases: dict[str, Case]) -> list:
    """The cases as a fixture's parameters."""
    return [pytest.param(case, id=name, marks=() if name in SAMPLE else pytest.mark.slow)
            for name, case in cases.items()]


@pytest.fixture(scope='session')
def cases() -> dict[str, Case]:
    """All, by name, for the tests that choose some."""
    return CASES | ARGUMENTS


@pytest.fixture(scope='module', params=params(CASES))
def case(request) -> Case:
    return request.param


@pytest.fixture(scope='module', params=params(CASES | ARGUMENTS))
def setting(request) -> Case:
    """Every class, and every argument of the ResNets."""
    return request.param


@pytest.fixture(scope='module', params=params({name: case for name, case in CASES.items() if case.frozen is not None}))
def freezing(request) -> Case:
    """The classes that freeze stages or norms."""
    return request.param


@pytest.fixture(scope='module', params=params({name: case for name, case in CASES.items() if case.with_cp}))
def checkpointing(request) -> Case:
    """The classes that checkpoint activations."""
    return request.param


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope='session')
def in_mode() -> Callable[[nn.Module, bool], nn.Module]:
    """``model.train(mode)``, which returns None in mmdet's backbones."""
    def switch(model: nn.Module, train: bool) -> nn.Module:
        model.train(train)
        return model
    return switch


@pytest.fixture(scope='session')
def assert_near() -> Callable[..., None]:
    """Tensors, or tuples of tensors, are equal up to rounding, in terms of the largest number in each."""
    def check(actual: Any, expected: Any, tolerance: float = 1e-5, name: str = '') -> None:
        actual, expected = ([x] if isinstance(x, Tensor) else list(x) for x in (actual, expected))
        assert [x.shape for x in actual] == [x.shape for x in expected]
        for one, other in zip(actual, expected, strict=True):
            assert torch.isfinite(other).all(), name
            size = max(other.abs().max().item(), 1e-30)
            torch.testing.assert_close(one / size, other / size, rtol=0, atol=tolerance,
                                       msg=lambda text: f'{name} {text}')
    return check
