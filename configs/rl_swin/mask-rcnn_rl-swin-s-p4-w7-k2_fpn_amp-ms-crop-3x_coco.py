_base_ = ['mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py', '../_base_/replacement.py']
model = dict(backbone=dict(type='RLSwin', replacement=dict(plan=dict(type='EveryKth', k=2))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
