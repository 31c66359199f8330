_base_ = 'fcos_rl-r101-caffe-k2_fpn_gn-head-1x_coco.py'
model = dict(backbone=dict(replacement=dict(plan=dict(k=4))))
