'''What an mmdet config names.'''
from .backbones import RLBackbone, RLResNet, RLResNetV1d, RLResNeXt, RLSwin

__all__ = ['RLBackbone', 'RLResNeXt', 'RLResNet', 'RLResNetV1d', 'RLSwin']
