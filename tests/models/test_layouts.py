"""Weights that other projects saved: each layout gives the outputs of the model that it was saved from."""
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from mmdet.models.backbones import PyramidVisionTransformer, ResNet, SwinTransformer
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rl_mmdet.engine import UserError, load_checkpoint_
from rl_mmdet.models import RLResNet, RLResNetV1d, RLSwin, RLViT
from rl_mmdet.models.layouts import own_layout, state_dict_of
from rl_mmdet.replacement import computing_layers, materialize, replace_blocks_

EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2))
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """A project's file and the backbone that reads it.

    Args:
        source: builds the model that the weights are of; its blocks are replaced by the same plan as ours.
        file: the source's state dict as the project's file holds it.
        cfg: config of our backbone.
        other: arguments that make it another architecture.
        maps: the source's feature maps of an image.
        images: height and width.
    """
    source: Callable[[], nn.Module]
    file: Callable[[Tensors], dict[str, Any]]
    cfg: dict[str, Any]
    other: dict[str, Any]
    maps: Callable[[nn.Module, Tensor], Any] = lambda source, image: source(image)
    images: tuple[int, int] = (64, 64)


def timm_maps(source: nn.Module, image: Tensor) -> list[Tensor]:
    return source.forward_intermediates(image, intermediates_only=True)


def normed(source: nn.Module, image: Tensor) -> list[Tensor]:
    """mmdet's Swin has a norm behind every stage, which no file has."""
    return [F.layer_norm(each.permute(0, 2, 3, 1), each.shape[1:2]).permute(0, 3, 1, 2)
            for each in timm_maps(source, image)]


def renamed(*rules: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def rename(tensors: Tensors) -> Tensors:
        for pattern, to in rules:
            tensors = {re.sub(pattern, to, key): value for key, value in tensors.items()}
        return tensors
    return rename


SWIN = dict(embed_dim=16, num_heads=(1, 2, 2, 4), window_size=2, img_size=128, num_classes=3)  # maps beyond the windows
OUR_SWIN = dict(type='RLSwin', embed_dims=16, depths=(2, 2, 6, 2), num_heads=(1, 2, 2, 4), window_size=2)
VIT = dict(embed_dim=24, depth=4, num_heads=2)
OUR_VIT = dict(type='RLViT', arch=VIT, img_size=64, window_size=2)
PVT = dict(embed_dims=8, num_layers=[2, 3, 3, 2], num_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2], pretrain_img_size=64)
CONVNEXT = dict(dims=(8, 16, 16, 32), depths=(1, 2, 5, 1))
WIDER = dict(base_channels=8)


def swin() -> nn.Module:
    return timm.create_model('swin_tiny_patch4_window7_224', **SWIN)


def original_swin(tensors: Tensors) -> dict[str, Any]:
    """timm has moved a stage's merging of patches to the next stage, and saves neither indices nor masks."""
    file = {re.sub(r'layers\.(\d)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', key): value
            for key, value in tensors.items()}
    index = SwinTransformer(**{k: v for k, v in OUR_SWIN.items() if k != 'type'}).state_dict()[
        'stages.0.blocks.0.attn.w_msa.relative_position_index']
    for key in list(tensors):
        if key.endswith('relative_position_bias_table'):
            block = key.removesuffix('.attn.relative_position_bias_table')
            file[f'{block}.attn.relative_position_index'] = index
            file[f'{block}.attn_mask'] = torch.zeros(4, 4, 4)
    return dict(model=renamed(('head.fc', 'head'))(file), epoch=299, config=dict(TYPE='swin'))


def vit() -> nn.Module:
    return timm.create_model('vit_tiny_patch16_224', **VIT, img_size=64, class_token=False, global_pool='avg',
                             num_classes=3, fc_norm=False)


def with_tokens(tensors: Tensors, **tokens: Tensor) -> Tensors:
    """Learned tokens before the patches, which have positions, too."""
    positions = [torch.ones(1, len(tokens), 24), tensors['pos_embed']]
    return tensors | tokens | {'pos_embed': torch.cat(positions, 1)}


def mae(tensors: Tensors) -> dict[str, Any]:
    decoder = {'mask_token': torch.ones(1, 1, 8), 'decoder_embed.weight': torch.ones(8, 24),
               'decoder_pos_embed': torch.ones(1, 17, 8), 'decoder_blocks.0.attn.qkv.weight': torch.ones(24, 8)}
    return dict(model=with_tokens(tensors, cls_token=torch.ones(1, 1, 24)) | decoder)


def deit(tensors: Tensors) -> dict[str, Any]:
    token = torch.ones(1, 1, 24)
    return dict(model=with_tokens(tensors, cls_token=token, dist_token=token) | {'head_dist.bias': torch.ones(3)})


def sam(tensors: Tensors) -> Tensors:
    more = {'image_encoder.neck.0.weight': torch.ones(8, 24, 1, 1), 'mask_decoder.iou_token.weight': torch.ones(1, 8),
            'prompt_encoder.no_mask_embed.weight': torch.ones(1, 8)}
    return renamed((r'mlp\.fc', 'mlp.lin'), ('^', 'image_encoder.'))(tensors) | more


def original_pvt(tensors: Tensors) -> Tensors:
    """PVT numbers the stages from 1 and its blocks without the positions, and has q apart from k and v."""
    file = {'cls_token': torch.ones(1, 1, 32), 'head.bias': torch.ones(3), 'norm.weight': torch.ones(32)}
    for key, value in tensors.items():
        _, stage, part, rest = key.split('.', 3)
        stage = int(stage) + 1
        if part == '0':
            file[f'patch_embed{stage}.{rest.replace("projection", "proj")}'] = value
        elif rest == '0.pos_embed':
            file[f'pos_embed{stage}'] = value
        elif part == '1':
            block, rest = rest.split('.', 1)
            key = f'block{stage}.{int(block) - 1}.{rest}'
            for ours, theirs in (('attn.attn.out_proj', 'attn.proj'), ('ffn.layers.0', 'mlp.fc1'),
                                 ('ffn.layers.3', 'mlp.fc2')):
                key = key.replace(ours, theirs)
            if 'in_proj' in key:
                q, kv = value.split([len(value) // 3, len(value) // 3 * 2])
                file.update({re.sub(r'attn\.attn\.in_proj_', f'attn.{name}.', key): part
                             for name, part in (('q', q), ('kv', kv))})
            else:
                file[key] = value.flatten(1) if 'mlp' in key and value.ndim == 4 else value
    return file


original_convnext = renamed(
    (r'stem\.(\d)', r'downsample_layers.0.\1'), (r'stages\.(\d)\.downsample', r'downsample_layers.\1'),
    (r'\.blocks\.', '.'), ('conv_dw', 'dwconv'), (r'mlp\.fc', 'pwconv'), (r'head\.norm', 'norm'))

LAYOUTS = {
    'swin_timm': Layout(swin, dict, OUR_SWIN, dict(embed_dims=8), normed, (128, 128)),
    'swin_original': Layout(swin, original_swin, dict(OUR_SWIN, convert_weights=True), dict(embed_dims=8), normed,
                            (128, 128)),
    'resnet_timm': Layout(lambda: timm.create_model('resnet50', channels=(4, 8, 16, 32)), dict, dict(
        type='RLResNet', depth=50, base_channels=4, stem_channels=64), WIDER, lambda *args: timm_maps(*args)[1:]),
    'resnet_v1d_timm': Layout(lambda: timm.create_model('resnet50d', channels=(4, 8, 16, 32), stem_width=2), dict, dict(
        type='RLResNetV1d', depth=50, base_channels=4), WIDER, lambda *args: timm_maps(*args)[1:]),
    'detectors_of_resnet': Layout(lambda: ResNet(50, base_channels=4), dict, dict(
        type='RLBackbone', backbone='DetectoRS_ResNet', depth=50, base_channels=4, conv_cfg=dict(type='ConvAWS')),
        WIDER),
    'vit_mae': Layout(vit, mae, dict(OUR_VIT, global_attn_indexes=range(4)), dict(arch=dict(VIT, embed_dim=48)),
                      lambda *args: timm_maps(*args)[-1:]),
    'vit_deit': Layout(vit, deit, dict(OUR_VIT, global_attn_indexes=range(4)), dict(arch=dict(VIT, embed_dim=48)),
                       lambda *args: timm_maps(*args)[-1:]),
    'sam': Layout(lambda: RLViT(**{key: value for key, value in OUR_VIT.items() if key != 'type'}), sam, OUR_VIT,
                  dict(arch=dict(VIT, embed_dim=48))),
    'pvt_original': Layout(lambda: PyramidVisionTransformer(**PVT), original_pvt, dict(
        PVT, type='RLBackbone', backbone='PyramidVisionTransformer'), dict(embed_dims=16)),
    'convnext_timm': Layout(lambda: timm.create_model('convnext_atto', **CONVNEXT), dict, dict(
        CONVNEXT, type='RLBackbone', timm='convnext_atto'), dict(dims=(8, 8, 8, 8)), timm_maps),
    'convnext_original': Layout(lambda: timm.create_model('convnext_atto', **CONVNEXT), lambda tensors: dict(
        model=original_convnext(tensors)), dict(CONVNEXT, type='RLBackbone', timm='convnext_atto'),
        dict(dims=(8, 8, 8, 8)), timm_maps),
}


SAMPLE = ('swin_original', 'resnet_v1d_timm', 'vit_mae', 'sam', 'pvt_original', 'convnext_original')
"""Layouts that every run of the tests covers; the others are ``slow``."""


@pytest.mark.parametrize('layout', [pytest.param(layout, id=name, marks=() if name in SAMPLE else pytest.mark.slow)
                                    for name, layout in LAYOUTS.items()])
def test_layout_gives_the_outputs_of_its_source(layout, randomise_, tmp_path, in_mode, assert_near):
    """The source's removed blocks are averages of their neighbours, as which ours start."""
    torch.manual_seed(0)
    source = layout.source()
    replace_blocks_(source, EVERY_SECOND)
    randomise_(source)
    for layer in computing_layers(source).values():
        nn.init.constant_(layer.coeff, 0.5)
    source = in_mode(materialize(source), False)
    torch.save(layout.file(dict(source.state_dict())), tmp_path / 'weights.pth')
    path = str(tmp_path / 'weights.pth')

    cfg = dict(layout.cfg, init_cfg=ConfigDict(type='Pretrained', checkpoint=path), replacement=EVERY_SECOND)
    model = MODELS.build(cfg)
    assert set(load_checkpoint_(model, path).initialised) == set(computing_layers(model))
    model.init_weights()
    image = torch.randn(1, 3, *layout.images, generator=torch.Generator().manual_seed(3))
    assert_near(in_mode(model, False)(image), layout.maps(source, image), 1e-3)
    with pytest.raises(UserError, match=r"tensors don't fit the model|can't read weights"):
        load_checkpoint_(MODELS.build(cfg | layout.other), path)


# Single layouts

def without_type(cfg: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cfg.items() if key != 'type'}


def timm_resnet(depth: str) -> nn.Module:
    more = dict(stem_width=2) if depth.endswith('d') else {}
    return timm.create_model(f'resnet{depth}', channels=(4, 8, 16, 32), **more)


@pytest.mark.parametrize(('build', 'source', 'maps', 'size'), [
    (lambda: RLResNet(18, base_channels=4, stem_channels=64), lambda: timm_resnet('18'), timm_maps, 64),
    (lambda: RLResNetV1d(depth=18, base_channels=4), lambda: timm_resnet('18d'), timm_maps, 64),
    (lambda: RLSwin(**without_type(OUR_SWIN)), swin, normed, 128)], ids=['resnet18', 'resnet18d', 'swin'])
def test_timm_layout_without_replacement_gives_its_outputs(build, source, maps, size, randomise_, in_mode, assert_near):
    source, model = in_mode(randomise_(source()), False), in_mode(build(), False)
    image = torch.randn(1, 3, size, size)
    model.load_state_dict(own_layout(model, source.state_dict()), strict=False)
    outs = model(image)
    assert_near(outs, maps(source, image)[-len(outs):])


def test_timm_layout_for_the_unreplaced_resnet_v1d_is_refused_as_it_would_not_be_read(tmp_path):
    torch.save(timm_resnet('50d').state_dict(), tmp_path / 'resnet50d.pth')
    with pytest.raises(UserError, match=r'stem\.0\.weight is missing'):
        load_checkpoint_(RLResNetV1d(depth=50, base_channels=4), str(tmp_path / 'resnet50d.pth'))


def test_timm_layout_for_mmdets_own_swin_is_refused_and_names_ours():
    with pytest.raises(ValueError, match=r"mmdet's SwinTransformer doesn't read timm's layout; RLSwin does"):
        own_layout(SwinTransformer(**without_type(OUR_SWIN)), swin().state_dict())


def test_preflight_names_the_missing_tensor_in_the_models_own_names(tmp_path):
    tensors = dict(swin().state_dict())
    del tensors['layers.2.blocks.4.attn.qkv.weight']
    torch.save(tensors, tmp_path / 'swin.pth')
    with pytest.raises(UserError, match=r'stages\.2\.blocks\.4\.attn\.w_msa\.qkv\.weight is missing'):
        load_checkpoint_(MODELS.build(dict(OUR_SWIN, replacement=EVERY_SECOND)), str(tmp_path / 'swin.pth'))


def test_detectors_own_class_accepts_resnet_weights_in_the_preflight(tmp_path):
    """mmcv's ConvAWS makes its own two buffers out of weights that lack them."""
    torch.save(ResNet(50, base_channels=4).state_dict(), tmp_path / 'resnet.pth')
    model = MODELS.build(dict(type='DetectoRS_ResNet', depth=50, base_channels=4, conv_cfg=dict(type='ConvAWS')))
    assert not load_checkpoint_(model, str(tmp_path / 'resnet.pth')).mismatched


def test_safetensors_file_initialises_a_resnet_as_the_pytorch_file_does(randomise_, tmp_path, assert_same_state):
    state = randomise_(ResNet(50, base_channels=4)).state_dict()
    torch.save(state, tmp_path / 'resnet.pth')
    save_file(state, tmp_path / 'resnet.safetensors')
    models = []
    for name in ('resnet.pth', 'resnet.safetensors'):
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / name))
        models.append(RLResNet(50, base_channels=4, replacement=EVERY_SECOND, init_cfg=init_cfg))
        models[-1].init_weights()
    assert torch.equal(models[1].layer3[0].conv2.weight, state['layer3.0.conv2.weight'])
    assert_same_state(models[1].state_dict(), models[0].state_dict())


# Positions of other sizes

def test_positions_of_another_grid_are_interpolated_when_a_vit_is_loaded(tmp_path):
    source = vit()
    torch.save(mae(source.state_dict()), tmp_path / 'mae.pth')
    model = RLViT(VIT, img_size=96, window_size=2,
                  init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'mae.pth')))
    model.init_weights()
    square = source.pos_embed.detach().view(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(square, (6, 6), mode='bicubic', antialias=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.pos_embed.detach(), expected)


def test_relative_positions_of_another_grid_are_interpolated_when_sams_layout_is_loaded(tmp_path, randomise_):
    source = randomise_(RLViT(VIT, img_size=96, window_size=3, global_attn_indexes=[3]))
    torch.save(sam(source.state_dict()), tmp_path / 'sam.pth')
    model = RLViT(VIT, img_size=64, window_size=2, global_attn_indexes=[3],
                  init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'sam.pth')))
    model.init_weights()
    for index, size in ((2, 3), (3, 7)):
        given = source.blocks[index].attn.rel_pos_h.detach()
        expected = F.interpolate(given.T[None], size, mode='linear')[0].T
        torch.testing.assert_close(model.blocks[index].attn.rel_pos_h.detach(), expected)


@pytest.mark.parametrize(('window', 'replacement'), [(3, None), (7, None), (7, EVERY_SECOND)])
def test_position_tables_of_another_window_are_interpolated_when_swins_layout_is_loaded(window, replacement):
    source, name = swin(), 'blocks.0.attn.{}relative_position_bias_table'
    model = RLSwin(**dict(without_type(OUR_SWIN), window_size=window, replacement=replacement))
    model.load_state_dict(original_swin(source.state_dict()), strict=False)
    given = source.layers[2].get_parameter(name.format(''))  # offsets from -1 to 1 in both directions, two heads
    square = F.interpolate(given.T.view(1, 2, 3, 3), (2 * window - 1, 2 * window - 1), mode='bicubic')
    torch.testing.assert_close(model.stages[2].get_parameter(name.format('w_msa.')), square.view(2, -1).T)


def test_position_table_that_is_no_square_raises():
    state = dict(swin().state_dict())
    state['layers.0.blocks.0.attn.relative_position_bias_table'] = torch.zeros(8, 1)
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0\..*table has 8 rows, which is no square, and can't be"):
        RLSwin(**without_type(OUR_SWIN)).load_state_dict(state)


def test_preflight_refuses_positions_of_no_square_grid(tmp_path):
    tensors = dict(vit().state_dict(), pos_embed=torch.zeros(1, 15, 24))
    torch.save(tensors, tmp_path / 'vit.pth')
    with pytest.raises(UserError, match=r'vit.pth: position embeddings for 15 tokens are for no square grid'):
        load_checkpoint_(RLViT(VIT, img_size=64, window_size=2), str(tmp_path / 'vit.pth'))


# Wrappers

@pytest.mark.parametrize('wrapper', ['model', 'state_dict', 'state_dict_ema', 'model_ema'])
def test_state_dict_of_finds_the_tensors_where_projects_keep_them(wrapper):
    tensors, others = {'a.weight': torch.ones(1)}, {'a.weight': torch.zeros(1)}
    assert state_dict_of({wrapper: tensors | dict(step=3), 'epoch': 3}) == tensors
    if wrapper.endswith('ema'):  # averages are preferred
        assert state_dict_of({wrapper: tensors, 'model': others}) == tensors


@pytest.mark.parametrize('prefix', ['backbone', 'backbone.'])
def test_state_dict_of_cuts_off_the_prefix(prefix):
    given = {'module.backbone.a': torch.ones(1), 'backbone2.a': torch.ones(1), 'neck.a': torch.ones(1)}
    assert list(state_dict_of(dict(state_dict=given), prefix)) == ['a']
