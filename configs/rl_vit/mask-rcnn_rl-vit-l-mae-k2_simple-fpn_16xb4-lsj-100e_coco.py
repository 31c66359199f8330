# The even blocks go: every sixth block, an odd one, attends to the whole image, and those four stay.
_base_ = 'mask-rcnn_vit-l-mae_simple-fpn_16xb4-lsj-100e_coco.py'
custom_hooks = [dict(type='StartHook'), dict(type='LearningStepsHook'), dict(type='FiniteLossHook')]
model = dict(backbone=dict(replacement=dict(plan=dict(type='EveryKth', k=2, offset=0))))
