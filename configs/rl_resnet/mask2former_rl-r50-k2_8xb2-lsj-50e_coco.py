_base_ = ['mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', '../_base_/replacement.py']
model = dict(backbone=dict(type='RLResNet', replacement=dict(plan=dict(type='EveryKth', k=2))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
