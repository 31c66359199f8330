"""As what: the computation that runs on the fused tensors in the place of a block."""
from .full_block import FullBlock
from .light_operator import LightOperator
from .operator import Operator
from .skip import Skip
from .slim_block import SlimBlock

__all__ = ['FullBlock', 'LightOperator', 'Operator', 'Skip', 'SlimBlock']
