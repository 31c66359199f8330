"""No fusion: weights of one's own."""
from ..registry import FUSIONS
from .scalar_fusion import ScalarFusion


@FUSIONS.register_module()
class OwnWeights(ScalarFusion):
    """No fusion: what the operator runs has weights of its own, which start as the average of the neighbours.

    There are no computing layers then. It is what a materialized model with light operators is loaded into, and
    the ablation that tells what the neighbours' weights are good for: the light operator alone. A baseline's state
    dict doesn't start its replaced blocks; with ``FullBlock`` the model is the baseline itself.

    Args:
        init, adapt: see :class:`Fusion`.
        learn: False fixes these weights, and the affine parameters of norms with them, as they were initialised or
            loaded; running statistics go on. From scratch mmdet's ResNet starts the last norm of every block at zero
            (``zero_init_residual``), and such a block would stay the identity.

    Raises:
        TypeError: ``learn`` isn't a bool.
    """

    def __init__(self, init: float = 0.5, adapt: bool = False, *, learn: bool = True) -> None:
        super().__init__(init=init, adapt=adapt)
        if not isinstance(learn, bool):
            raise TypeError(f'OwnWeights: learn must be True or False, got {learn!r}')
        self.learn = learn

    def _settings(self) -> str:
        return super()._settings() + ('' if self.learn else ', learn=False')
