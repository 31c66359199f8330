# From digit scenes to blood cells: the small backbone that configs/digits/faster-rcnn_r34_fpn_digits.py has trained,
# all of it fine-tuned. The transfers in this folder update a part of it.
_base_ = 'faster-rcnn_r34_fpn_24e_bccd.py'
checkpoint = 'work_dirs/faster-rcnn_r34_fpn_digits/epoch_4.pth'
model = dict(
    backbone=dict(
        base_channels=16,
        norm_eval=True,
        init_cfg=dict(_delete_=True, type='Pretrained', prefix='backbone.', checkpoint=checkpoint)),
    neck=dict(in_channels=[16, 32, 64, 128]))
