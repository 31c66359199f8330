"""Backbones with Replacement Learning."""
from .rl_backbone import build_rl_backbone
from .rl_resnet import RLResNet, RLResNetV1d, RLResNeXt
from .rl_swin import RLSwin
from .rl_vit import RLViT
from .timm_backbone import TimmBackbone

__all__ = ['RLResNeXt', 'RLResNet', 'RLResNetV1d', 'RLSwin', 'RLViT', 'TimmBackbone', 'build_rl_backbone']
