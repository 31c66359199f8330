"""What an mmdet config names."""
from .backbones import RLBackbone, RLResNet, RLResNetV1d, RLResNeXt, RLSwin, RLViT
from .necks import LN2d, SimpleFPN

__all__ = ['LN2d', 'RLBackbone', 'RLResNeXt', 'RLResNet', 'RLResNetV1d', 'RLSwin', 'RLViT', 'SimpleFPN']
