"""Build a run's parts as the runner will, on a few images, without writing or changing anything global."""
import inspect
import tempfile
import time
from functools import partial
from itertools import chain

from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

from ..errors import UserError
from .data import Lengthened, SmallData
from .first_batch import check_classes, initialise_, see, small_loader
from .guard import built, find_class, meant, nothing_global
from .schedule import check_step

PHASES = ('train', 'val', 'test')
AP = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
"""COCO's scores, where the evaluator doesn't name others."""


def rehearse(cfg: Config, model: nn.Module, *phases: str) -> None:
    """Build what a run with this config builds, and let its detector see a few images.

    Args:
        cfg: the config; it stays as it is.
        model: the config's model, which is used up.
        phases: ``train``, ``val``, ``test``.

    Raises:
        UserError: the first mistake found, with the setting that is to blame.
    """
    model = revert_sync_batchnorm(model)
    phases = [phase for phase in phases if cfg.get(f'{phase}_dataloader') is not None]
    with nothing_global(), tempfile.TemporaryDirectory() as folder:
        small, loaders = SmallData(folder), {}
        for phase in phases:
            setting = f'{phase}_dataloader'
            loaders[phase] = built(cfg, setting, partial(small_loader, setting=setting, small=small))
            check_classes(model, loaders[phase], setting)
        new = partial(Rehearsal, model=model, loaders=loaders, folder=folder)
        if 'train' in phases:
            for setting, build in PARTS.items():
                if cfg.get(setting) is not None:
                    built(cfg, setting, lambda cfg, build=build: build(new(cfg)))
        built(cfg, 'model', lambda cfg: initialise_(model))
        for phase in phases:
            own = loaders[phase].dataset
            seen = see(cfg, phase, model, small, own) if isinstance(own, Lengthened) else None
            for part, build in (('evaluator', partial(_evaluate, seen=seen)), ('cfg', _build_loop)):
                if phase != 'train':
                    built(cfg, f'{phase}_{part}', lambda cfg, phase=phase, build=build: build(new(cfg), phase, small))


class Rehearsal(Runner):
    """Has what MMEngine's methods that build a runner's parts ask for, and nothing else.

    Args:
        cfg: the run's config, which the methods may change.
        model: the run's model.
        loaders: loaders by phase.
        folder: for whatever a part writes.
    """

    def __init__(self, cfg: Config, model: nn.Module, loaders: dict[str, DataLoader], folder: str) -> None:
        self.cfg, self.model, self.optim_wrapper = cfg, model, None
        self._train_dataloader, self._val_dataloader, self._test_dataloader = map(loaders.get, PHASES)
        self._train_loop, self._val_loop, self._test_loop = (cfg.get(f'{phase}_cfg') for phase in PHASES)
        self._val_evaluator, self._test_evaluator = cfg.get('val_evaluator'), cfg.get('test_evaluator')
        self._distributed, self._launcher, self._rank, self._world_size = False, 'none', 0, 1
        self._load_from, self._resume, self._seed, self._randomness_cfg, self._hooks = None, False, 0, {}, []
        self._work_dir = self._log_dir = folder
        self._experiment_name = self._timestamp = 'preflight'
        self.logger, self.param_schedulers = MMLogger.get_current_instance(), None
        self.message_hub = MessageHub.get_instance(self._experiment_name)
        for name in ('iter', 'epoch', 'max_iters', 'max_epochs'):
            self.message_hub.update_info(name, 0)
        self.visualizer = Visualizer.get_instance(self._experiment_name)

    def build_visualizer(self, visualizer: dict | None = None) -> object:
        """The run's, by a new name, for of a name there is only one, and in another folder."""
        return super().build_visualizer(visualizer and dict(
            visualizer, name=f'preflight_{time.monotonic_ns()}', save_dir=self._log_dir))

    def rehearse_custom_hooks(self) -> None:
        """Build the hooks, and what EMA's makes of the settings that it hands on."""
        self.register_custom_hooks(self.cfg.custom_hooks)
        for hook in self._hooks:
            if isinstance(hook, EMAHook):
                MODELS.build(hook.ema_cfg, default_args=dict(model=nn.Linear(1, 1)))

    def rehearse_optimizer(self) -> None:
        """Build the optimizer with its learning rate, and make a step."""
        if find_class(RUNNERS, self.cfg.get('runner_type', 'Runner')) is Runner:  # others have their strategies
            self.optim_wrapper = self.build_optim_wrapper(self.cfg.optim_wrapper)
            self._train_dataloader = self.cfg.train_dataloader  # as in a run: a built one may have no batch size
            self.scale_lr(self.optim_wrapper, self.cfg.get('auto_scale_lr'))
            check_step(self.optim_wrapper, self.model)

    def rehearse_schedule(self) -> None:
        """Build the schedulers on the train loop and the optimizer."""
        self._check_scheduler_cfg(self.cfg.param_scheduler)
        self._train_loop = self.build_train_loop(self._train_loop)
        self.rehearse_optimizer()
        if self.optim_wrapper is not None:
            schedulers = self.build_param_scheduler(self.cfg.param_scheduler)
            for each in schedulers if isinstance(schedulers, list) else chain(*schedulers.values()):
                each.step()
                each.step()


PARTS = {
    'randomness': lambda runner: inspect.signature(Runner.set_randomness).bind_partial(runner, **runner.cfg.randomness),
    'env_cfg': lambda runner: inspect.signature(set_multi_processing).bind(**runner.cfg.env_cfg.get('mp_cfg', {})),
    'visualizer': lambda runner: runner.build_visualizer(runner.cfg.visualizer),
    'log_processor': lambda runner: runner.build_log_processor(runner.cfg.log_processor),
    'default_hooks': lambda runner: runner.register_default_hooks(runner.cfg.default_hooks),
    'custom_hooks': Rehearsal.rehearse_custom_hooks,
    'optim_wrapper': Rehearsal.rehearse_optimizer,
    'auto_scale_lr': Rehearsal.rehearse_optimizer,
    'train_cfg': lambda runner: runner.build_train_loop(runner.cfg.train_cfg),
    'param_scheduler': Rehearsal.rehearse_schedule,
}
"""How each setting's part is built, in an order in which an error is the first one's that it can be."""


def _build_loop(runner: Rehearsal, phase: str, small: SmallData) -> None:
    """Build the loop of val or test."""
    small.small_evaluator_(runner.cfg[f'{phase}_evaluator'])
    getattr(runner, f'build_{phase}_loop')(runner.cfg[f'{phase}_cfg'])


def _evaluate(runner: Rehearsal, phase: str, small: SmallData, seen: tuple | None) -> None:
    """Build the evaluator, and compute COCO's metrics of a few predictions."""
    evaluator = runner.cfg[f'{phase}_evaluator']
    small.small_evaluator_(evaluator)
    evaluator = runner.build_evaluator(evaluator)
    if seen is not None and type(evaluator) is Evaluator and all(type(one) is CocoMetric for one in evaluator.metrics):
        batch, predictions = seen
        evaluator.dataset_meta = getattr(runner, f'_{phase}_dataloader').dataset.metainfo
        evaluator.process(data_samples=predictions, data_batch=batch)
        evaluator.evaluate(len(predictions))
        if phase == 'val' and not any(each.classwise or set(each.metrics) - {'bbox', 'segm'}
                                      for each in evaluator.metrics):
            _check_best(runner.cfg, [f'{each.prefix}/{kind}_{item}' for each in evaluator.metrics
                                     for kind in each.metrics for item in each.metric_items or AP])


def _check_best(cfg: Config, scores: list[str]) -> None:
    """Refuse a score by which a checkpoint is the best, or a training is stopped early, and that nobody computes."""
    best = ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('save_best') or []
    wanted = [('default_hooks.checkpoint.save_best', name) for name in ([best] if isinstance(best, str) else best)]
    wanted += [(f'custom_hooks.{index}.monitor', hook['monitor'])
               for index, hook in enumerate(cfg.get('custom_hooks') or []) if 'monitor' in hook]
    for setting, name in wanted:
        if name not in ('auto', *scores):
            raise UserError(f'{setting}: no score is called {name!r}{meant(name, scores)}')
