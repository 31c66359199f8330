_base_ = 'mask-rcnn_vit-b-mae_simple-fpn_16xb4-lsj-100e_coco.py'
custom_hooks = [dict(type='StartHook'), dict(type='LearningStepsHook'), dict(type='FiniteLossHook')]
model = dict(backbone=dict(replacement=dict(plan=dict(type='EveryKth', k=2))))
