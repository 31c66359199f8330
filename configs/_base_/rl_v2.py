# RL-v2: thin convolutions stand where every second block was, and the blocks beside them learn from them, too. Take it
# to save computation and memory, training from scratch. From pretrained weights take rl_v2_pretrained.py: there this
# one begins as if the blocks were left out. Compare with operator=dict(type='Skip'), which does leave them out: so far
# it has kept as much AP from scratch, and costs less (docs/results/README.md, 9). AP from scratch was measured with
# width=0.25 alone.
#   model = dict(backbone=dict(type='RLResNet', replacement=_base_.replacement))
_base_ = 'replacement.py'
replacement = dict(
    plan=dict(type='EveryKth', k=2), operator=dict(type='SlimBlock'), gradient=dict(mode='coupled'))
