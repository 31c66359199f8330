_base_ = 'vit-base-p16_16xb64_in1k.py'
custom_hooks = [dict(type='EMAHook', momentum=4e-5, priority='ABOVE_NORMAL'), dict(type='StartHook'),
                dict(type='LearningStepsHook'), dict(type='FiniteLossHook')]
model = dict(backbone=dict(
    replacement=dict(plan=dict(type='EveryKth', k=4), gradient=dict(mode='coupled'))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
