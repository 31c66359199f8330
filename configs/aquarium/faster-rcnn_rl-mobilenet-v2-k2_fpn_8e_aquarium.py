_base_ = ['faster-rcnn_mobilenet-v2_fpn_8e_aquarium.py', '../_base_/replacement.py']
model = dict(
    backbone=dict(type='RLBackbone', backbone='MobileNetV2', replacement=dict(plan=dict(type='EveryKth', k=2))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
