_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', '../_base_/learned_plan.py']
model = dict(backbone=dict(type='RLSwin', replacement=dict(plan=dict(type='LearnedPlan', budget=dict(params=0.88)))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
