"""What an mmdet config names."""
from .backbones import RLResNet, RLResNetV1d, RLResNeXt

__all__ = ['RLResNeXt', 'RLResNet', 'RLResNetV1d']
