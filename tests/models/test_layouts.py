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

from rl_mmdet.engine import UserError, check_checkpoint
from rl_mmdet.models import RLResNet, RLResNetV1d, RLSwin, RLViT
from rl_mmdet.models.layouts import own_layout, resize_offsets, resize_positions, resize_table, state_dict_of
from rl_mmdet.replacement import computing_layers, materialize, replace_blocks_

EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2), fusion=dict(pretrained='least_squares'))
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
    'swin_original': Layout(swin, original_swin, OUR_SWIN, dict(embed_dims=8), normed, (128, 128)),
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


@dataclass(frozen=True)
class Saved:
    layout: Layout
    source: nn.Module
    path: str

    def build(self, **more: Any) -> nn.Module:
        init_cfg = ConfigDict(type='Pretrained', checkpoint=self.path)
        return MODELS.build(dict(self.layout.cfg, init_cfg=init_cfg, replacement=EVERY_SECOND) | more)


@pytest.fixture(scope='module', params=LAYOUTS.values(), ids=LAYOUTS)
def saved(request, randomise_, tmp_path_factory) -> Saved:
    """A source whose removed blocks are exact combinations of their neighbours, saved as its project does."""
    torch.manual_seed(0)
    source = request.param.source()
    replace_blocks_(source, EVERY_SECOND)
    source = materialize(randomise_(source))
    source.eval()
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save(request.param.file(dict(source.state_dict())), path)
    return Saved(request.param, source, str(path))


def test_layout_gives_the_outputs_of_its_source(saved, in_mode, assert_near):
    image = torch.randn(1, 3, *saved.layout.images, generator=torch.Generator().manual_seed(3))
    model = saved.build()
    model.init_weights()
    assert_near(in_mode(model, False)(image), saved.layout.maps(saved.source, image), 1e-3)


def test_layout_initialises_every_replaced_block(saved):
    model = saved.build()
    model.init_weights()
    for layer in computing_layers(model).values():
        assert not layer.coeff.eq(0.5).any()


def test_preflight_accepts_the_layout(saved):
    model = saved.build()
    assert set(check_checkpoint(model, saved.path).fits) == set(computing_layers(model))


def test_preflight_refuses_the_layout_for_another_architecture(saved):
    with pytest.raises(UserError, match=r"tensors don't fit the model|can't read weights"):
        check_checkpoint(saved.build(**saved.layout.other), saved.path)


# Single layouts

def test_plain_timm_resnet18_gives_its_outputs(randomise_, in_mode, assert_near):
    source = randomise_(timm.create_model('resnet18', channels=(4, 8, 16, 32))).eval()
    model, image = RLResNet(18, base_channels=4, stem_channels=64), torch.randn(1, 3, 64, 64)
    model.load_state_dict(source.state_dict(), strict=False)
    assert_near(in_mode(model, False)(image), timm_maps(source, image)[1:])


def test_timm_resnet18d_gives_its_outputs(randomise_, in_mode, assert_near):
    source = randomise_(timm.create_model('resnet18d', channels=(4, 8, 16, 32), stem_width=2)).eval()
    model, image = RLResNetV1d(depth=18, base_channels=4), torch.randn(1, 3, 64, 64)
    missing, _ = model.load_state_dict(own_layout(model, source.state_dict()), strict=False)
    assert missing == []
    assert_near(in_mode(model, False)(image), timm_maps(source, image)[1:])


def test_timm_layout_for_the_unreplaced_resnet_v1d_is_refused_as_it_would_not_be_read(tmp_path):
    source = timm.create_model('resnet50d', channels=(4, 8, 16, 32), stem_width=2)
    torch.save(source.state_dict(), tmp_path / 'resnet50d.pth')
    with pytest.raises(UserError, match=r'stem\.0\.weight is missing'):
        check_checkpoint(RLResNetV1d(depth=50, base_channels=4), str(tmp_path / 'resnet50d.pth'))


def test_timm_layout_for_mmdets_own_swin_is_refused_and_names_ours():
    cfg = {key: value for key, value in OUR_SWIN.items() if key != 'type'}
    with pytest.raises(ValueError, match=r"mmdet's SwinTransformer doesn't read timm's layout; RLSwin does"):
        own_layout(SwinTransformer(**cfg), swin().state_dict())


def test_swin_without_replacement_reads_timms_layout(randomise_, in_mode, assert_near):
    source, image = randomise_(swin()).eval(), torch.randn(1, 3, 128, 128)
    model = RLSwin(**{key: value for key, value in OUR_SWIN.items() if key != 'type'})
    model.load_state_dict(source.state_dict(), strict=False)
    assert_near(in_mode(model, False)(image), normed(source, image))


def test_preflight_names_the_missing_tensor_in_the_models_own_names(tmp_path):
    tensors = dict(swin().state_dict())
    del tensors['layers.2.blocks.4.attn.qkv.weight']
    torch.save(tensors, tmp_path / 'swin.pth')
    with pytest.raises(UserError, match=r'stages\.2\.blocks\.4\.attn\.w_msa\.qkv\.weight is missing'):
        check_checkpoint(MODELS.build(dict(OUR_SWIN, replacement=EVERY_SECOND)), str(tmp_path / 'swin.pth'))


def test_detectors_own_class_accepts_resnet_weights_in_the_preflight(tmp_path):
    """mmcv's ConvAWS makes its own two buffers out of weights that lack them."""
    torch.save(ResNet(50, base_channels=4).state_dict(), tmp_path / 'resnet.pth')
    model = MODELS.build(dict(type='DetectoRS_ResNet', depth=50, base_channels=4, conv_cfg=dict(type='ConvAWS')))
    assert not check_checkpoint(model, str(tmp_path / 'resnet.pth')).mismatched


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


@pytest.mark.parametrize('tokens', [0, 1, 2])
def test_resize_positions_drops_the_tokens_before_the_patches(tokens):
    patches = torch.randn(1, 16, 5)
    resized = resize_positions(torch.cat([torch.ones(1, tokens, 5), patches], 1), (4, 4))
    assert torch.equal(resized.flatten(1, 2), patches)


def test_resize_positions_of_no_square_grid_raises():
    with pytest.raises(ValueError, match=r'for 15 tokens are for no square grid .* can.t be interpolated to 4x6'):
        resize_positions(torch.zeros(1, 15, 8), (4, 6))


def test_resize_table_of_no_square_raises():
    with pytest.raises(ValueError, match=r'table of 48 rows is not square and can.t be interpolated to 5x5'):
        resize_table(torch.zeros(48, 2), (5, 5))


@pytest.mark.parametrize('resize', [lambda x: resize_table(x, (7, 7)), lambda x: resize_offsets(x, 49)])
def test_resize_of_the_same_size_is_the_same_tensor(resize):
    table = torch.randn(49, 2)
    assert resize(table) is table


def test_preflight_refuses_positions_of_no_square_grid(tmp_path):
    tensors = dict(vit().state_dict(), pos_embed=torch.zeros(1, 15, 24))
    torch.save(tensors, tmp_path / 'vit.pth')
    with pytest.raises(UserError, match=r'vit.pth: position embeddings for 15 tokens are for no square grid'):
        check_checkpoint(RLViT(VIT, img_size=64, window_size=2), str(tmp_path / 'vit.pth'))


# Wrappers

@pytest.mark.parametrize('wrapper', ['model', 'state_dict', 'state_dict_ema', 'model_ema'])
def test_state_dict_of_finds_the_tensors_where_projects_keep_them(wrapper):
    tensors = {'a.weight': torch.ones(1)}
    assert state_dict_of({wrapper: tensors, 'epoch': 3}, wrapped=True) == tensors


def test_state_dict_of_prefers_the_average():
    average, last = {'a': torch.ones(1)}, {'a': torch.zeros(1)}
    assert state_dict_of(dict(model=last, model_ema=average), wrapped=True) == average


def test_state_dict_of_leaves_out_what_is_no_tensor():
    assert state_dict_of(dict(a=torch.ones(1), epoch=3, args=dict(lr=0.1))).keys() == {'a'}


@pytest.mark.parametrize('prefix', ['backbone', 'backbone.'])
def test_state_dict_of_cuts_off_the_prefix(prefix):
    given = {'module.backbone.a': torch.ones(1), 'backbone2.a': torch.ones(1), 'neck.a': torch.ones(1)}
    assert list(state_dict_of(dict(state_dict=given), prefix)) == ['a']
