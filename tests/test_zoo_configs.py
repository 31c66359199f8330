"""Every config for COCO trains a step: its detector, made small, with its own optimizer settings, on random images."""
from functools import cache
from pathlib import Path
from unittest.mock import patch

import mmengine
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from rl_mmdet.replacement import computing_layers, set_step_

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
ZOO = [path for path in sorted(CONFIGS.glob('rl_*/*.py')) if '-k4_' not in path.name]  # k2 replaces more
SAMPLE = ('faster-rcnn_rl-r50-k2_fpn_1x_coco', 'cascade-rcnn_rl-x101-64x4d-k2_fpn_1x_coco',
          'mask2former_rl-r50-k2_8xb2-lsj-50e_coco-panoptic', 'mask-rcnn_rl-swin-t-p4-w7-k2_fpn_1x_coco',
          'mask-rcnn_rl-vit-b-mae-k2_simple-fpn_16xb4-lsj-100e_coco', 'dino-5scale_rl-swin-t-k2_8xb2-12e_coco',
          'rtmdet_rl-m-k2_8xb32-300e_coco', 'rtmdet_r50_8xb32-300e_coco')
SIZE = 64
WIDTHS = {'base_channels', 'in_channels', 'out_channels', 'feat_channels', 'conv_out_channels', 'fc_out_channels',
          'embed_dims', 'num_feats', 'feedforward_channels', 'widen_factor', 'backbone_channel', 'groups'}
IN_DETR = {'in_channels', 'feedforward_channels'}  # outside its backbone: 256 channels are written into the code
AT_MOST = dict(num_queries=20, num_dn_queries=10, num_points=64, num_layers=2, num=32, nms_pre=200, max_per_img=50)
INSTEAD = dict(size=(SIZE, SIZE), img_size=SIZE, init_cfg=None, drop_path_rate=0.)
ARCHS = dict(base=dict(embed_dim=96, depth=12, num_heads=12), large=dict(embed_dim=128, depth=24, num_heads=16))


def small(node, widths=WIDTHS):
    """A model's settings with an eighth of the channels and little of all else, but as many blocks in the backbone."""
    if isinstance(node, (list, tuple)):
        return type(node)(small(child, widths) for child in node)
    if not isinstance(node, dict):
        return node
    made = {}
    for key, value in node.items():
        if key in widths:
            made[key] = eighth(value)
        elif key in AT_MOST:
            made[key] = min(value, AT_MOST[key])
        elif key == 'arch' and value in ARCHS:
            made[key] = ARCHS[value]
        elif key in INSTEAD:
            made[key] = INSTEAD[key]
        else:
            detr = {'backbone', 'encoder'} <= set(node) and key != 'backbone'
            made[key] = small(value, IN_DETR if detr else widths)
    if 'depth' in made:
        made.update(base_channels=8, zero_init_residual=False)  # zeros would hold up the coefficients for a step
    if made.get('replacement'):
        made['replacement']['gradient'] = dict(every=1)  # all blocks are to learn in the one step
    if made.get('type') == 'SyncBN':
        made['type'] = 'BN'  # the other one trains on GPUs alone
    return made


def eighth(value):
    if isinstance(value, (list, tuple)):
        return [eighth(each) for each in value]
    return value / 8 if value < 8 else value // 8


@cache
def read_once(path):
    return mmengine.load(path)


def train_a_step(path):
    """A config's small detector after its first step, the losses, the gradients by name, the optimizer's wrapper."""
    with patch('mmengine.config.utils.load', read_once):  # MMDetection's metafiles, at every `mmdet::`
        cfg = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(ConfigDict(small(cfg.model.to_dict())))
        wrapper = build_optim_wrapper(model, dict(cfg.optim_wrapper, type='OptimWrapper'))  # AMP needs a GPU
    model.init_weights()
    model.train()
    set_step_(model, 0, staggered=False)  # a step in which all replaced blocks learn
    MessageHub.get_current_instance().update_info('epoch', 0)  # the training loop's business; TOOD looks it up
    masks = 'panoptic_head' in cfg.model or 'mask_head' in cfg.model.get('roi_head', {})
    data = demo_mm_inputs(2, (3, SIZE, SIZE), num_items=[3, 3], num_classes=80, with_mask=masks,
                          with_semantic='panoptic' in path.stem)
    loss, log = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    wrapper.backward(loss)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    wrapper.step()
    return model, log, gradients, wrapper


@pytest.mark.parametrize('path', [
    pytest.param(path, id=path.stem, marks=[] if path.stem in SAMPLE else pytest.mark.slow) for path in ZOO])
def test_a_step_is_finite_and_every_coefficient_learns_without_decay(path):
    model, log, gradients, wrapper = train_a_step(path)
    assert all(torch.isfinite(value).all() for value in (log['loss'], *log.values(), *model.parameters()))

    layers = computing_layers(model)
    assert bool(layers) == ('_rl-' in path.name)
    for name in layers:
        gradient = gradients[f'{name}.coeff']
        assert torch.isfinite(gradient).all() and (gradient != 0).all(), name
        coefficients = model.get_parameter(f'{name}.coeff')
        [group] = [group for group in wrapper.param_groups if any(p is coefficients for p in group['params'])]
        assert group['lr'] > 0 and group['weight_decay'] == 0, name
