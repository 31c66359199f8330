_base_ = ['swin-tiny_16xb64_in1k.py', '../_base_/replacement.py']
# mmpretrain's Swin has the weights of mmdet's, which detectors run, under the same keys.
model = dict(backbone=dict(
    type='mmdet.RLBackbone',
    backbone='mmpretrain.SwinTransformer',
    replacement=dict(plan=dict(type='EveryKth', k=4), gradient=dict(mode='coupled'))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
