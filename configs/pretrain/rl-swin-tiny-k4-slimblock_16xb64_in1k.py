_base_ = 'rl-swin-tiny-k4_16xb64_in1k.py'
model = dict(backbone=dict(replacement=dict(operator=dict(type='SlimBlock'))))
