# MMDetection's runtime for trainings of minutes: a line every few seconds, the last two checkpoints, a fixed seed.
_base_ = 'mmdet::_base_/default_runtime.py'
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
