_base_ = ['mmdet::gfl/gfl_r50_fpn_1x_coco.py', '../_base_/replacement.py']
model = dict(backbone=dict(type='RLResNet', replacement=dict(plan=dict(type='EveryKth', k=2))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
