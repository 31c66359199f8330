"""Backbones with Replacement Learning."""
from .rl_resnet import RLResNet, RLResNetV1d, RLResNeXt

__all__ = ['RLResNeXt', 'RLResNet', 'RLResNetV1d']
