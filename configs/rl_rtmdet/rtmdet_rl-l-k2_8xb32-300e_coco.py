_base_ = 'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py'
custom_imports = dict(imports=['rl_mmdet'], allow_failed_imports=False)
custom_hooks = [*_base_.custom_hooks, dict(type='StartHook'), dict(type='LearningStepsHook'),
                dict(type='FiniteLossHook')]
model = dict(backbone=dict(
    type='RLBackbone',
    backbone='CSPNeXt',
    replacement=dict(plan=dict(type='EveryKth', k=2), gradient=dict(mode='coupled'))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
