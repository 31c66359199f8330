_base_ = ['mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py', '../_base_/learned_plan.py']
plan = dict(type='LearnedPlan', budget=dict(params=0.6), epochs=3)
model = dict(backbone=dict(type='RLResNet', replacement=dict(plan=plan)))
del plan
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
