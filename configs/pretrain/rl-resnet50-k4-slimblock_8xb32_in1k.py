_base_ = 'rl-resnet50-k4_8xb32_in1k.py'
model = dict(backbone=dict(replacement=dict(operator=dict(type='SlimBlock'))))
