_base_ = ['dino-5scale_swin-t_8xb2-12e_coco.py', '../_base_/replacement.py']
model = dict(backbone=dict(type='RLSwin', replacement=dict(plan=dict(type='EveryKth', k=2))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
