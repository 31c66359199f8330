"""The coefficients of the replaced blocks in the training's log."""
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...replacement import computing_layers
from ...replacement.checks import check_number
from ..detectors import plain_model


@HOOKS.register_module()
class LogCoefficientsHook(Hook):
    """Write every replaced block's (a, b) to the visualisation backends, as ``replacement/<block>/a`` and ``.../b``.

    MMDetection's default backend appends them to ``vis_data/scalars.json``; TensorBoard and others draw curves. Where a
    fusion has several pairs, their mean is written. A block without such coefficients is left out.

    Args:
        interval: iterations between two entries; the start and the last iteration are always written.

    Raises:
        ValueError: ``interval`` below 1.
    """

    def __init__(self, interval: int = 50) -> None:
        self.interval = check_number('LogCoefficientsHook: interval', interval, whole=True, least=1)

    def before_train(self, runner: Runner) -> None:
        if runner.iter == 0:
            self._write(runner, 0)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        step = runner.iter + 1
        if step % self.interval == 0 or step == runner.max_iters:
            self._write(runner, step)

    def _write(self, runner: Runner, step: int) -> None:
        model = plain_model(runner)
        scalars = {}
        for name, layer in computing_layers(model).items():
            coeff = layer._parameters.get('coeff')
            if coeff is not None:
                a, b = coeff.detach().float().reshape(2, -1).mean(1).tolist()
                scalars |= {f'replacement/{name}/a': a, f'replacement/{name}/b': b}
        if scalars:
            runner.visualizer.add_scalars(scalars, step=step)
