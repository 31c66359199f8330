_base_ = 'rl-resnet50-k4_8xb32_in1k.py'
model = dict(backbone=dict(depth=101, replacement=dict(plan=dict(blocks=dict(layer3=[1, 5, 9, 13, 17, 21])))))
