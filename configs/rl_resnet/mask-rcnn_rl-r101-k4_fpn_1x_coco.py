_base_ = 'mask-rcnn_rl-r101-k2_fpn_1x_coco.py'
model = dict(backbone=dict(replacement=dict(plan=dict(k=4))))
