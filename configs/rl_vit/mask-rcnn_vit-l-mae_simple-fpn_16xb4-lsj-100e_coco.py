_base_ = 'mask-rcnn_vit-b-mae_simple-fpn_16xb4-lsj-100e_coco.py'
model = dict(
    backbone=dict(
        arch='large', drop_path_rate=0.4, init_cfg=dict(checkpoint='timm://vit_large_patch16_224.mae')),
    neck=dict(backbone_channel=1024))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.8))
