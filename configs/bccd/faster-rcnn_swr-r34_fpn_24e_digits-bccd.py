# A policy learns in the first half which tensors of the backbone, at most a tenth of its parameters, are updated.
_base_ = 'faster-rcnn_r34_fpn_24e_digits-bccd.py'
custom_imports = dict(imports=['rl_mmdet'], allow_failed_imports=False)
custom_hooks = [dict(type='FiniteLossHook'), dict(type='SearchHook')]
model = dict(backbone=dict(type='RLResNet', transfer=dict(type='SWR', budget=0.1)))
