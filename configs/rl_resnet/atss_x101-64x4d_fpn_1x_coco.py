# MMDetection has no ATSS with ResNeXt: its ATSS, with the backbone of its other X-101 detectors.
_base_ = 'mmdet::atss/atss_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=64,
        base_width=4,
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://resnext101_64x4d')))
