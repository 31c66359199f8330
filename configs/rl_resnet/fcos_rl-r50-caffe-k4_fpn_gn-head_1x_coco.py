_base_ = 'fcos_rl-r50-caffe-k2_fpn_gn-head_1x_coco.py'
model = dict(backbone=dict(replacement=dict(plan=dict(k=4))))
