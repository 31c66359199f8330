"""The search for a plan inside a run."""
from mmdet.registry import HOOKS
from mmengine.dist import all_reduce, broadcast, master_only
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from ...policy import BlockSearch
from ...replacement import computing_layers
from ...replacement.search_space import NAME
from ..errors import UserError
from ..files import write_text
from ..search import FOUND, SEARCH, drop_parameters_, found_config_file, searched_module, set_plan_
from .recalibrate_norms import RecalibrateNormsHook


@HOOKS.register_module()
class SearchHook(Hook):
    """Learn which blocks are replaced, in the first part of a run; then turn the model into the replaced one.

    For ``plan=dict(type='LearnedPlan', ...)``, see :class:`rl_mmdet.policy.LearnedPlan`; idle without one. When the
    search ends, the choice is logged and saved as an ordinary config, ``<config>_found.py`` in the work dir; model,
    EMA and optimizer go on with the weights and states they have, and BatchNorm in eval mode gets statistics for the
    neighbours that are final. Checkpoints have the policy's state while it learns, and the plan afterwards.

    All processes of DDP draw the same gates, and learn from the mean of their gradients. Validation shows the choice
    that would be made at that moment.

    Args:
        interval: iterations between two lines of the log, ``search/<block>``: the probability that it is replaced.
        find_unused_parameters: DDP's setting for after the search.

    Raises:
        UserError: the search is longer than the run, or a checkpoint to resume from has none.
    """
    priority = 'HIGH'

    def __init__(self, interval: int = 50, find_unused_parameters: bool = False) -> None:
        self.interval = interval
        self.find_unused_parameters = find_unused_parameters
        self.search: BlockSearch | None = None
        self.plan: dict | None = None
        self.scale = 1.

    def before_run(self, runner: Runner) -> None:
        found = searched_module(_model(runner)) if runner._train_dataloader is not None else None
        if found is not None:
            self.name, module = found
            self.search = BlockSearch(module, self._steps(runner, module))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.search is None or not runner._resume:
            return
        if SEARCH not in checkpoint:
            raise UserError(f'resume: the checkpoint has no state of a search, which {self.search.space.plan} in the '
                            'config asks for; load it with load_from to begin a search')
        try:
            self.search.load_state_dict(checkpoint[SEARCH])
        except ValueError as error:
            raise UserError(f'resume: {error}; resume with the settings of the run that it is from') from None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if self.search is not None:
            scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
            self.scale = scaler.get_scale() if scaler is not None else 1.
            self.search.sample()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        if self.search is None:
            return
        self.search.learn(lambda gradient: all_reduce(gradient.div_(self.scale), op='mean'), broadcast)
        policy = self.search.policy
        runner.message_hub.update_scalar('train/settled', sum(gate is not None for gate in policy.settled))
        if policy.step % self.interval == 0 or self.search.done:
            probabilities = policy.probabilities().tolist()
            runner.visualizer.add_scalars(
                {f'search/{self.name}.{unit.name}': p for unit, p in zip(policy.units, probabilities, strict=True)},
                step=runner.iter + 1)
        if self.search.done:
            self._finish(runner)

    def before_val(self, runner: Runner) -> None:
        if self.search is not None:
            self.search.show_best()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.search is not None:
            checkpoint[SEARCH] = self.search.state_dict()
        if self.plan is not None:
            checkpoint[FOUND] = self.plan

    def _steps(self, runner: Runner, module: nn.Module) -> int:
        plan, most = getattr(module, NAME).plan, runner.max_iters
        steps = plan.iters or max(1, most // 2)
        if plan.epochs is not None:
            if not isinstance(runner.train_loop, EpochBasedTrainLoop):
                raise UserError(f'{plan}: the training counts iterations, not epochs; give the search iters=...')
            steps = plan.epochs * len(runner.train_dataloader)
        if steps > most:
            raise UserError(f'{plan}: the search of {steps} iterations is longer than the run of {most}; shorten it or '
                            'train longer')
        return steps

    def _finish(self, runner: Runner) -> None:
        """Go on with the replaced model."""
        search, self.search = self.search, None
        model, plan = _model(runner), search.space.plan
        averages = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
        choice, left = search.decide()
        report = search.finish_(choice, *(average.module.get_submodule(self.name) for average in averages))
        search.model.replacement_report = report
        for average in averages:
            own = average.module.state_dict() if average.update_buffers else dict(average.module.named_parameters())
            average.avg_parameters = own
        drop_parameters_(runner.optim_wrapper, _schedulers(runner), model)
        self._wrap_again_(runner, model)
        for layer in computing_layers(search.model).values():
            layer.norm_stale = True  # of other neighbours, as long as gates were drawn
        for hook in runner.hooks:
            if isinstance(hook, RecalibrateNormsHook):
                hook.recalibrate(runner)
        self.plan = dict(type='Blocks', blocks={name: list(blocks) for name, blocks in report.replaced.items()})
        set_plan_(runner.cfg, self.plan)
        print_log(f'{plan}: the search has ended, {left:.3f} of the unreplaced {type(search.model).__name__}\'s '
                  f'{plan.budget.name} are left\n{report}', 'current')
        self._save_config(runner)

    def _wrap_again_(self, runner: Runner, model: nn.Module) -> None:
        """DDP's buckets are made for the parameters of before."""
        cfg = runner.cfg
        cfg.find_unused_parameters = self.find_unused_parameters
        wrapper = cfg.get('model_wrapper_cfg')
        if wrapper:
            wrapper.find_unused_parameters = self.find_unused_parameters
        if runner.model is model:
            return
        runner.model = None
        runner.model = runner.wrap_model(wrapper, model)

    @master_only
    def _save_config(self, runner: Runner) -> None:
        path = found_config_file(runner.cfg)
        write_text(path, runner.cfg.pretty_text)
        print_log(f'the config with this plan: {path}', 'current')


def _model(runner: Runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _schedulers(runner: Runner) -> list:
    schedulers = runner.param_schedulers or []
    return [one for each in schedulers.values() for one in each] if isinstance(schedulers, dict) else schedulers
