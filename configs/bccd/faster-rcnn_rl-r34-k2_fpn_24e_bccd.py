_base_ = ['faster-rcnn_r34_fpn_24e_bccd.py', '../_base_/replacement.py']
model = dict(backbone=dict(
    type='RLResNet', replacement=dict(plan=dict(type='EveryKth', k=2), gradient=dict(mode='coupled'))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
