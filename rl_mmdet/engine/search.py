"""What a search for a plan, or for the tensors of a transfer, means for a run: its checks, and what it has found."""
import os
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from torch import nn

from ..search import LearnedPlan, searched_setting
from .config import searches_of, set_unused_, type_name
from .errors import UserError
from .reading import meta_of, read_checkpoint

FOUND = 'found'
"""Key in the ``meta`` of checkpoints saved after a search: the setting that it has found."""
SEARCH = 'search'
"""Key of checkpoints saved during a search: its state."""


def searched_module(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The module for which a search is going on, with its name.

    Raises:
        UserError: there are several.
    """
    searched = [(name, module) for name, module in model.named_modules() if searched_setting(module) is not None]
    if len(searched) > 1:
        raise UserError(f'model: {" and ".join(name for name, _ in searched)} have a search each, and a run has one; '
                        'give the others a plan such as EveryKth, or a transfer such as Tensors')
    return searched[0] if searched else None


def check_search(cfg: Config, model: nn.Module) -> None:
    """Check a run's settings against those of the search in it, if there is one.

    Raises:
        UserError: the search is longer than the run, or what it can't do: FSDP, DeepSpeed, compiling, a static
            graph, activation checkpoints under DDP.
    """
    searched = searched_module(model)
    if searched is None:
        return
    setting = searched_setting(searched[1])
    loop, wrapper = cfg.get('train_cfg') or {}, cfg.get('model_wrapper_cfg') or {}
    try:
        setting.schedule.check(loop.get('max_epochs'), loop.get('max_iters'))
    except ValueError as error:
        raise UserError(f'{setting}: {error}') from None
    for kind, allowed in ((cfg.get('runner_type'), 'Runner'), (wrapper, 'MMDistributedDataParallel')):
        if type_name(kind) not in (None, allowed):
            raise UserError(f'{setting}: a search runs in one process or under DDP, not with {type_name(kind)}; search '
                            'with MMEngine\'s Runner, then train what it finds with any')
    if not isinstance(setting, LearnedPlan):
        return
    if cfg.get('compile'):
        raise UserError(f'{setting}: what runs changes with every step, so a search can\'t be compiled; leave compile '
                        'out, and compile with the plan that it finds')
    if wrapper.get('static_graph'):
        raise UserError(f'{setting}: what runs changes with every step, so the graph of a search isn\'t static; leave '
                        'model_wrapper_cfg.static_graph out')
    if cfg.get('launcher', 'none') != 'none' and any(getattr(module, 'with_cp', False) for module in model.modules()):
        raise UserError(f'{setting}: with_cp=True and DDP that looks for unused parameters, as a search needs it, mark '
                        'a variable ready twice; set with_cp=False until the plan is found')


def take_found_(cfg: Config, checkpoint: str | None, allow_pickle: bool = False) -> None:
    """If a checkpoint was saved after a search, let the config have the plan that was found, and search no more.

    Args:
        checkpoint: None leaves the config as it is.

    Raises:
        UserError: the checkpoint can't be read.
    """
    if not checkpoint or not searches_of(cfg):
        return
    read = read_checkpoint(checkpoint, allow_pickle)
    found = meta_of(read).get(FOUND)
    if found:
        set_found_(cfg, found)
        cfg.custom_hooks.append(dict(type='SearchHook', found=found))  # so that later checkpoints know it as well


def set_found_(cfg: Config, found: Mapping[str, Any]) -> None:
    """Make the config of a search the ordinary one with what was found."""
    for node, key in searches_of(cfg):
        if key in found:
            node[key] = deepcopy(dict(found[key]))
    hooks = cfg.get('custom_hooks') or []
    for hook in hooks:
        if type_name(hook) == 'SearchHook':
            set_unused_(cfg, hook.get('find_unused_parameters', False))
    cfg.custom_hooks = [hook for hook in hooks if type_name(hook) != 'SearchHook']


def found_config(cfg: Config) -> Config:
    """The config of a run whose search has ended, for a run from its start."""
    cfg = Config(cfg.to_dict())  # names in the place of the classes that a lazy config has
    if cfg.get('resume'):
        cfg.load_from, cfg.resume = None, False
    for name in ('work_dir', 'launcher', 'experiment_name'):
        cfg.pop(name, None)
    return cfg


def found_config_file(cfg: Config, work_dir: str) -> str:
    """Where a search saves the config with what it finds."""
    stem = os.path.splitext(os.path.basename(cfg.filename or 'config'))[0]
    return os.path.join(work_dir, f'{stem}_found.py')


def drop_parameters_(optim_wrapper: OptimWrapper, schedulers: list[_ParamScheduler], model: nn.Module) -> None:
    """Let an optimizer forget parameters that the model has no longer, and the state of those that don't learn.

    Groups that become empty are dropped, from the schedulers as well.
    """
    own = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    optimizer = optim_wrapper.optimizer
    for group in optimizer.param_groups:
        for parameter in group['params']:
            if not own.get(id(parameter)):
                optimizer.state.pop(parameter, None)
        group['params'] = [parameter for parameter in group['params'] if id(parameter) in own]
    empty = {index for index, group in enumerate(optimizer.param_groups) if not group['params']}
    optimizer.param_groups[:] = [group for index, group in enumerate(optimizer.param_groups) if index not in empty]
    for scheduler in schedulers:
        for name in ('base_values', '_last_value', 'min_values'):
            values = getattr(scheduler, name, None)
            if isinstance(values, list):
                setattr(scheduler, name, [value for index, value in enumerate(values) if index not in empty])
