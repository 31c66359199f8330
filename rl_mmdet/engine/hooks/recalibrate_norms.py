"""Fresh BatchNorm statistics for replaced blocks before the first step."""
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...replacement import recalibrate_norms_, stale_norms
from ...replacement.checks import check_number
from ..calibration import feature_extractor, images_of, training_batches
from ..detectors import plain_model


@HOOKS.register_module()
class RecalibrateNormsHook(Hook):
    """Recalibrate the BatchNorm statistics of replaced blocks that were initialised from a baseline's weights.

    mmdet trains with ``norm_eval=True``, so a replaced block, whose weights are new, would otherwise use the removed
    block's statistics for the whole training. This hook works once, after loading and before the first step, and not
    in a resumed training. Under DDP every process sees its own batches and the statistics are averaged.

    Args:
        num_batches: batches of the training set per process, augmented as in training.

    Raises:
        ValueError: ``num_batches`` below 1.
    """

    priority = 'BELOW_NORMAL'  # after MeanTeacherHook, which gives the teacher the student's weights

    def __init__(self, num_batches: int = 20) -> None:
        self.num_batches = check_number('RecalibrateNormsHook: num_batches', num_batches, whole=True, least=1)

    def before_train(self, runner: Runner) -> None:
        self.recalibrate(runner)

    def recalibrate(self, runner: Runner) -> None:
        """Recalibrate now, if the weights of some replaced blocks are newer than their statistics."""
        model = plain_model(runner)
        mode = model.training
        model.train()
        if stale_norms(model):
            run = feature_extractor(model, stale_norms)
            count = recalibrate_norms_(model, training_batches(runner, self.num_batches),
                                       run=lambda batch: run(model, images_of(model, batch)),
                                       reduce=lambda tensor: all_reduce(tensor, op='mean'))
            print_log(f'recalibrated {count} BatchNorms of replaced blocks on {self.num_batches} batches', 'current')
        model.train(mode)
