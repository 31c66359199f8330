_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', '../_base_/learned_plan.py']
plan = dict(type='LearnedPlan', budget=dict(params=0.88), epochs=3)
model = dict(backbone=dict(type='RLSwin', replacement=dict(plan=plan)))
del plan
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
