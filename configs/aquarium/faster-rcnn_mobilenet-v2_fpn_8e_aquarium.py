# Faster R-CNN with MobileNetV2 from ImageNet weights, at 320 pixels: fine-tuning that fits CPUs.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/datasets/aquarium_detection.py',
    '../_base_/schedules/schedule_8e.py', '../_base_/default_runtime.py'
]
channels = 64
strides = [8, 16, 32]

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(2, 4, 6),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='data/weights/mobilenet-v2_imagenet.pth')),
    neck=dict(in_channels=[32, 96, 320], out_channels=channels, num_outs=4),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4], strides=[*strides, 64])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, featmap_strides=strides),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=7)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)))
optim_wrapper = dict(optimizer=dict(lr=0.0005))
