# What a config with a plan that is learned needs besides `model.backbone` and `optim_wrapper.constructor`.
custom_imports = dict(imports=['rl_mmdet'], allow_failed_imports=False)
custom_hooks = [
    dict(type='StartHook'),  # BatchNorm statistics of the new weights, before and after the search
    dict(type='LearningStepsHook'),  # in which steps each replaced block learns
    dict(type='FiniteLossHook'),
    dict(type='SearchHook'),
]
find_unused_parameters = True  # under DDP: a step of the search uses a part of the weights; afterwards it's False
