# What every config with Replacement Learning needs besides `model.backbone` and `optim_wrapper.constructor`.
custom_imports = dict(imports=['rl_mmdet'], allow_failed_imports=False)
custom_hooks = [
    dict(type='StartHook'),  # before the first step: replacement.start, BatchNorm statistics of the new weights
    dict(type='LearningStepsHook'),  # in which steps each replaced block learns
    dict(type='FiniteLossHook'),
]
