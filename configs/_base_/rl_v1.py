# RL-v1: every second block of a stage takes a mix of its neighbours' weights in place of its own. Take it to train
# fewer parameters and still end with an ordinary checkpoint for MMDetection's own config. It saves no memory by itself.
#   model = dict(backbone=dict(type='RLResNet', replacement=_base_.replacement))
_base_ = 'replacement.py'
replacement = dict(plan=dict(type='EveryKth', k=2))
