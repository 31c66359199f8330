"""With what: learnable maps from the neighbours' tensors to those that a replaced block uses."""
from .fusion import Fusion, Pair
from .own_weights import OwnWeights
from .scalar_fusion import ScalarFusion
from .shared_weights import SharedWeights
from .transform_fusion import TransformFusion

__all__ = ['Fusion', 'OwnWeights', 'Pair', 'ScalarFusion', 'SharedWeights', 'TransformFusion']
