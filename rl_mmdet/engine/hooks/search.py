"""A search inside a run: for the blocks to replace, or for the tensors to update."""
from typing import Any

from mmengine.config import ConfigDict
from mmengine.dist import all_reduce, broadcast, master_only
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from ...replacement import computing_layers
from ...replacement.checks import check_number
from ...search import LearnedPlan, Search, begin_search, searched_setting
from ..config import set_unused_
from ..detectors import plain_model
from ..errors import UserError
from ..files import write_text
from ..search import FOUND, SEARCH, drop_parameters_, found_config, found_config_file, searched_module, set_found_
from .start import StartHook


@HOOKS.register_module()
class SearchHook(Hook):
    """Search in the first part of a run, then turn the model into the ordinary one with what was found.

    For ``plan=dict(type='LearnedPlan', ...)`` (:class:`rl_mmdet.search.LearnedPlan`) and
    ``transfer=dict(type='SWR', ...)`` (:mod:`rl_mmdet.search.transfers`); idle without them. When the search ends, the
    choice is logged and saved as an ordinary config, ``<config>_found.py`` in the work dir; model, EMA and optimizer go
    on with the weights and states they have, and BatchNorm in eval mode gets statistics for weights that are new.
    Checkpoints have the search's state while it goes on. Afterwards they have what it has found and the config with it,
    so that a file is enough for ``DetInferencer(weights=FILE)``.

    All processes of DDP draw the same gates, and learn from the mean of their gradients. Validation shows the choice
    that would be made at that moment.

    Args:
        interval: iterations between two lines of the log, ``search/<unit>``: the probability that it is chosen.
        find_unused_parameters: DDP's setting for after the search.
        found: what a search has found before this run was resumed, to be kept in its checkpoints.

    Raises:
        UserError: the search is longer than the run, a checkpoint to resume from has none, several optimizers, or DDP
            that doesn't look for unused parameters.
    """
    priority = 'HIGH'

    def __init__(self, interval: int = 50, find_unused_parameters: bool = False, found: dict | None = None) -> None:
        self.interval = check_number('SearchHook: interval', interval, whole=True, least=1)
        self.find_unused_parameters = find_unused_parameters
        self.search: Search | None = None
        self.found = found.to_dict() if isinstance(found, ConfigDict) else found
        self.name: str | None = None
        self.scale = 1.
        self._state: dict | None = None

    def before_run(self, runner: Runner) -> None:
        searched = searched_module(plain_model(runner)) if runner._train_dataloader is not None else None
        if searched is not None:
            self.name, module = searched
            self.steps = _steps(runner, searched_setting(module))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.name is None or not runner._resume:
            return
        if SEARCH not in checkpoint:
            setting = searched_setting(plain_model(runner).get_submodule(self.name))
            raise UserError(f'resume: the checkpoint has no state of a search, which {setting} in the config asks for; '
                            'load it with load_from to begin a search')
        self._state = checkpoint[SEARCH]

    def before_train(self, runner: Runner) -> None:
        if self.name is None:
            return
        self._check(runner)
        self.search = begin_search(plain_model(runner).get_submodule(self.name), self.steps)
        if self._state is not None:
            try:
                self.search.load_state_dict(self._state)
            except (ValueError, KeyError) as error:
                raise UserError(f'resume: {error}; resume with the settings of the run that it is from') from None
            self._state = None
        runner.optim_wrapper.optimizer.register_step_pre_hook(lambda *_: self.search and self.search.look())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if self.search is not None:
            scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
            self.scale = scaler.get_scale() if scaler is not None else 1.
            self.search.sample()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        if self.search is None:
            return
        self.search.learn(self._reduce, broadcast)
        runner.message_hub.update_scalar('train/settled', self.search.num_settled)
        if self.every_n_train_iters(runner, self.interval) or self.search.done:
            scalars = {f'search/{self.name}.{unit}': value for unit, value in self.search.scalars().items()}
            runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
        if self.search.done:
            self._finish(runner)

    def before_val(self, runner: Runner) -> None:
        if self.search is not None:
            self.search.show_best()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.search is not None:
            checkpoint[SEARCH] = self.search.state_dict()
        if self.found is not None:
            checkpoint['meta'][FOUND] = self.found
            runtime = checkpoint['message_hub']['runtime_info']  # has the config of the run's beginning
            runtime['cfg'] = checkpoint['meta']['cfg']

    def _check(self, runner: Runner) -> None:
        setting = searched_setting(plain_model(runner).get_submodule(self.name))
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            raise UserError(f'{setting}: a search needs one optimizer for the whole model, not a '
                            f'{type(runner.optim_wrapper).__name__}')
        if isinstance(setting, LearnedPlan) and not getattr(runner.model, 'find_unused_parameters', True):
            raise UserError(f'{setting}: a step of the search doesn\'t use all parameters; set '
                            'find_unused_parameters=True, as configs/_base_/learned_plan.py does')

    def _reduce(self, gradient: Tensor) -> None:
        all_reduce(gradient.div_(self.scale), op='mean')

    def _finish(self, runner: Runner) -> None:
        """Go on with the ordinary model."""
        search, self.search = self.search, None
        model = plain_model(runner)
        averages = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
        self.found, text = search.conclude_(*(average.module.get_submodule(self.name) for average in averages))
        for average in averages:
            own = average.module.state_dict() if average.update_buffers else dict(average.module.named_parameters())
            average.avg_parameters = own
        drop_parameters_(runner.optim_wrapper, _schedulers(runner), model)
        self._wrap_again_(runner, model)
        for hook in runner.hooks:
            if isinstance(hook, StartHook):
                hook.recalibrate(runner)
        for average in averages:
            _copy_statistics_(model, average.module)
        print_log(f'the search has ended. {text}', 'current')
        set_found_(runner.cfg, self.found)
        self._save_config(runner)

    def _wrap_again_(self, runner: Runner, model: nn.Module) -> None:
        """DDP's buckets are made for the parameters of before."""
        set_unused_(runner.cfg, self.find_unused_parameters)
        if runner.model is not model:
            runner.model = None
            runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model)

    @master_only
    def _save_config(self, runner: Runner) -> None:
        if not runner.cfg.get('model'):  # a Runner without a config
            return
        path = found_config_file(runner.cfg, runner.work_dir)
        write_text(path, found_config(runner.cfg).pretty_text)
        print_log(f'the config with what was found: {path}', 'current')


def _copy_statistics_(model: nn.Module, average: nn.Module) -> None:
    """The statistics of computing layers' norms that don't train, which are new."""
    others = computing_layers(average)
    for name, layer in computing_layers(model).items():
        for mine, theirs in zip(layer.modules(), others[name].modules(), strict=True):
            for key, buffer in mine.named_buffers(recurse=False) if not mine.training else ():
                theirs.get_buffer(key).copy_(buffer)


def _steps(runner: Runner, setting: Any) -> int:
    """Length of the search for a plan or a transfer, in iterations."""
    epochs = runner.max_epochs if isinstance(runner.train_loop, EpochBasedTrainLoop) else None
    try:
        return setting.schedule.steps(epochs, runner.max_iters)
    except ValueError as error:
        raise UserError(f'{setting}: {error}') from None


def _schedulers(runner: Runner) -> list:
    schedulers = runner.param_schedulers or []
    return [one for each in schedulers.values() for one in each] if isinstance(schedulers, dict) else schedulers
