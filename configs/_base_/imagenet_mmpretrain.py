# What the configs of configs/pretrain have in common. It is the first of their bases: without mmpretrain they stop
# here with one line, before MMEngine fetches an mmpretrain of its own choice. (Older MMEngine would take a file with an
# import statement for another kind of config.)
if __import__('importlib.util').util.find_spec('mmpretrain') is None:
    raise ImportError('mmpretrain is not installed; pip install "rl_mmdet[pretrain]"')
data_root = 'data/imagenet'
