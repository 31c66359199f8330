"""The setting ``replacement.start``: where computing layers begin when a baseline's weights are loaded."""
from ..checks import check_number
from ..registry import STARTS


@STARTS.register_module()
class Average:
    """The average of the neighbours: every a and b is the fusion's ``init``, whatever the removed block was.

    Attributes:
        keeps_block: the removed block stays beside the model until the layer has been fitted to its outputs.
    """
    keeps_block = False

    def __repr__(self) -> str:
        return 'Average()'


@STARTS.register_module()
class FitOutputs:
    """What gives the removed block's outputs on training images; see :func:`~.fit_outputs.fit_outputs_`.

    Loading a baseline leaves the average; before the first step ``StartHook``, or a call of ``fit_outputs_``,
    fits all that the computing layers learn. Until then the removed blocks stay on the CPU. Nothing is fitted where a
    replaced model's own checkpoint is loaded, nor in a resumed training.

    Args:
        batches: batches of the training set, per process.
        steps: of the fit, each with one of the batches.
        lr: Adam's learning rate at the start; it follows a cosine down to zero.
        fade: iterations of the training in which the removed blocks fade out; see :class:`~.fade.Fade`.

    Raises:
        ValueError: ``batches`` or ``steps`` below 1, ``lr`` not above 0, or ``fade`` below 0.
    """
    keeps_block = True

    def __init__(self, batches: int = 20, steps: int = 200, lr: float = 0.03, fade: int = 0) -> None:
        self.batches = check_number('FitOutputs: batches', batches, whole=True, least=1)
        self.steps = check_number('FitOutputs: steps', steps, whole=True, least=1)
        self.lr = check_number('FitOutputs: lr', lr, above=0)
        self.fade = check_number('FitOutputs: fade', fade, whole=True, least=0)

    def __repr__(self) -> str:
        return f'FitOutputs(batches={self.batches}, steps={self.steps}, lr={self.lr}, fade={self.fade})'
