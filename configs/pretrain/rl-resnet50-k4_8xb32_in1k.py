_base_ = ['resnet50_8xb32_in1k.py', '../_base_/replacement.py']
# Every fourth block, as EveryKth(k=4) chooses them in a detector that freezes stage 1.
model = dict(backbone=dict(type='mmdet.RLResNet', norm_eval=False, replacement=dict(
    plan=dict(type='Blocks', blocks=dict(layer2=[1], layer3=[1], layer4=[1])), gradient=dict(mode='coupled'))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
