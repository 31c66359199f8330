_base_ = ['mmdet::detr/detr_r101_8xb2-500e_coco.py', '../_base_/replacement.py']
model = dict(backbone=dict(type='RLResNet', replacement=dict(plan=dict(type='EveryKth', k=2))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
