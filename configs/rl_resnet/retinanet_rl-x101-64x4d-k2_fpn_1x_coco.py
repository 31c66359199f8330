_base_ = ['mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py', '../_base_/replacement.py']
model = dict(backbone=dict(type='RLResNeXt', replacement=dict(plan=dict(type='EveryKth', k=2))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
