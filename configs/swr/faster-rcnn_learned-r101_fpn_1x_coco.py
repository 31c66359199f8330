_base_ = ['mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py', '../_base_/learned_plan.py']
model = dict(backbone=dict(type='RLResNet', replacement=dict(plan=dict(type='LearnedPlan', budget=dict(params=0.6)))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
