_base_ = ['faster-rcnn_r50_fpn_2e_coco-subset.py', '../_base_/replacement.py']
model = dict(backbone=dict(
    type='RLResNet', replacement=dict(plan=dict(type='EveryKth', k=2), gradient=dict(mode='coupled'))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
