# A policy learns in the first quarter which blocks to replace; the rest trains what it has chosen.
_base_ = ['faster-rcnn_r34_fpn_24e_bccd.py', '../_base_/learned_plan.py']
plan = dict(type='LearnedPlan', budget=dict(params=0.7), epochs=6)
model = dict(backbone=dict(type='RLResNet', replacement=dict(plan=plan, gradient=dict(mode='coupled'))))
del plan
optim_wrapper = dict(constructor='RLOptimWrapperConstructor')
