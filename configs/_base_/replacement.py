# What every config with Replacement Learning needs besides `model.backbone` and `optim_wrapper.constructor`.
custom_imports = dict(imports=['rl_mmdet'], allow_failed_imports=False)
custom_hooks = [
    dict(type='FitOutputsHook'),  # carries out replacement.start=dict(type='FitOutputs')
    dict(type='RecalibrateNormsHook'),  # BatchNorm statistics of the new weights, before the first step
    dict(type='LearningStepsHook'),  # in which steps each replaced block learns
    dict(type='FiniteLossHook'),
    dict(type='ResumeHook'),  # a resumed training is the same as one that was never interrupted
]
