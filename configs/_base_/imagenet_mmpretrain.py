# What the configs of configs/pretrain have in common. It is the first of their bases: without mmpretrain they stop
# here with one line, before MMEngine fetches an mmpretrain of its own choice.
from importlib.util import find_spec

if find_spec('mmpretrain') is None:
    raise ImportError('mmpretrain is not installed; pip install "rl_mmdet[pretrain]"')
data_root = 'data/imagenet'
