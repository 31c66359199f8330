"""Which step of a training comes next, for the replaced blocks that learn in one of several."""
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...replacement import set_step_
from ..detectors import plain_model


@HOOKS.register_module()
class LearningStepsHook(Hook):
    """Tell the replaced blocks before every iteration which one it is (:func:`~rl_mmdet.replacement.set_step_`).

    A resumed training then has its blocks learn in the same iterations as one that was never interrupted, and all
    iterations cost alike. In a model that is compiled (``compile`` of the config) all blocks learn in the same
    iterations, so that it has two graphs. Without this hook they learn in every iteration.
    """

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        set_step_(plain_model(runner), runner.iter, staggered=not runner.cfg.get('compile'))
