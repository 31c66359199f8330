"""What an mmdet config names."""
from .backbones import RLResNet, RLResNetV1d, RLResNeXt, RLSwin, RLViT, TimmBackbone, build_rl_backbone
from .necks import LN2d, SimpleFPN

__all__ = ['LN2d', 'RLResNeXt', 'RLResNet', 'RLResNetV1d', 'RLSwin', 'RLViT', 'SimpleFPN', 'TimmBackbone',
           'build_rl_backbone']
