"""Backbones with Replacement Learning."""
from .rl_backbone import RLBackbone
from .rl_resnet import RLResNet, RLResNetV1d, RLResNeXt
from .rl_swin import RLSwin
from .rl_vit import RLViT

__all__ = ['RLBackbone', 'RLResNeXt', 'RLResNet', 'RLResNetV1d', 'RLSwin', 'RLViT']
