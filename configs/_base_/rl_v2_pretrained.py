# RL-v2 from pretrained weights: wider thin blocks, fitted to what the removed blocks did, which fade out over 1000
# iterations. Take it to save memory in fine-tuning; with a short schedule set `fade` to half of its iterations.
#   model = dict(backbone=dict(type='RLResNet', replacement=_base_.replacement))
_base_ = 'replacement.py'
replacement = dict(
    plan=dict(type='EveryKth', k=2),
    operator=dict(type='SlimBlock', width=0.25),
    fusion=dict(type='TransformFusion', rank=16),
    gradient=dict(every=1),
    start=dict(type='FitOutputs', fade=1000))
