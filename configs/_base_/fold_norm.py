# fold_norm: convolution and frozen BatchNorm computed as one. Take it where a ResNet runs out of memory with large
# images or batches, with one of the recipes rl_*.py or alone: gradients stay exact. Without BatchNorm (Swin, ViT) there
# is nothing to fold.
#   model = dict(backbone=dict(type='RLResNet', **_base_.fold_norm))
fold_norm = dict(norm_eval=True, fold_norm=True)
