# A policy learns in the first half which blocks to replace; the second half trains what it has chosen.
_base_ = ['faster-rcnn_r34_fpn_digits.py', '../_base_/learned_plan.py']
model = dict(backbone=dict(type='RLResNet', replacement=dict(plan=dict(type='LearnedPlan', budget=dict(params=0.7)))))
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
