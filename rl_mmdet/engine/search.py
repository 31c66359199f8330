"""What a search for a plan means for a run: its checks, its settings, and the plan that it has found."""
import os
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from torch import nn

from ..replacement.search_space import NAME
from .checkpoint import read_checkpoint
from .config import learned_plans
from .errors import UserError

FOUND = 'found_plan'
"""Key of checkpoints saved after a search: the plan that it has found."""
SEARCH = 'search'
"""Key of checkpoints saved during a search: the state of the policy."""


def searched_module(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The module whose plan is being learned, with its name.

    Raises:
        UserError: there are several.
    """
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, NAME)]
    if len(found) > 1:
        raise UserError(f'model: {" and ".join(name for name, _ in found)} have a plan that is learned each, and one '
                        'search is for one module; give the others a plan such as EveryKth')
    return found[0] if found else None


def check_search(cfg: Config, model: nn.Module) -> None:
    """Check a run's settings against those of the search in it, if there is one.

    Raises:
        UserError: the search is longer than the run, or what it can't do: FSDP, DeepSpeed, compiling, a static graph.
    """
    found = searched_module(model)
    if found is None:
        return
    plan, loop = getattr(found[1], NAME).plan, cfg.get('train_cfg') or {}
    epochs, iters = loop.get('max_epochs'), loop.get('max_iters')
    if plan.epochs is not None and epochs is None:
        raise UserError(f'{plan}: the training counts iterations, not epochs; give the search iters=...')
    if plan.epochs is not None and plan.epochs > epochs:
        raise UserError(f'{plan}: the search is longer than the run of {epochs} epochs (train_cfg.max_epochs); shorten '
                        'it or train longer')
    if plan.iters is not None and iters is not None and plan.iters > iters:
        raise UserError(f'{plan}: the search is longer than the run of {iters} iterations (train_cfg.max_iters); '
                        'shorten it or train longer')
    wrapper = (cfg.get('model_wrapper_cfg') or {}).get('type', 'MMDistributedDataParallel')
    if cfg.get('runner_type', 'Runner') != 'Runner' or wrapper != 'MMDistributedDataParallel':
        raise UserError(f'{plan}: a search runs in one process or under DDP, not with '
                        f'{cfg.get("runner_type") or wrapper}; search with MMEngine\'s Runner, then train the plan that '
                        'it finds with any')
    if cfg.get('compile'):
        raise UserError(f'{plan}: what runs changes with every step, so a search can\'t be compiled; leave compile '
                        'out, and compile with the plan that it finds')
    if (cfg.get('model_wrapper_cfg') or {}).get('static_graph'):
        raise UserError(f'{plan}: what runs changes with every step, so the graph of a search isn\'t static; leave '
                        'model_wrapper_cfg.static_graph out')


def take_found_plan_(cfg: Config, checkpoint: str | None, allow_pickle: bool = False) -> None:
    """If a checkpoint was saved after a search, let the config have the plan that was found, and search no more.

    Args:
        checkpoint: None leaves the config as it is.

    Raises:
        UserError: the checkpoint can't be read.
    """
    found = read_checkpoint(checkpoint, allow_pickle).get(FOUND) if checkpoint and learned_plans(cfg) else None
    if found:
        set_plan_(cfg, found)


def set_plan_(cfg: Config, plan: Mapping[str, Any]) -> None:
    """Make the config of a search the ordinary one with the plan that was found."""
    for setting in learned_plans(cfg):
        setting['plan'] = deepcopy(dict(plan))
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if hook.get('type') != 'SearchHook']


def found_config_file(cfg: Config) -> str:
    """Where a search saves the config with the plan that it finds."""
    stem = os.path.splitext(os.path.basename(cfg.filename or 'config'))[0]
    return os.path.join(cfg.work_dir, f'{stem}_found.py')


def drop_parameters_(optim_wrapper: OptimWrapper, schedulers: list[_ParamScheduler], model: nn.Module) -> None:
    """Let an optimizer forget parameters that the model has no longer: their state, and groups that become empty."""
    kept = {id(parameter) for parameter in model.parameters()}
    optimizer = optim_wrapper.optimizer
    for group in optimizer.param_groups:
        for parameter in group['params']:
            if id(parameter) not in kept:
                optimizer.state.pop(parameter, None)
        group['params'] = [parameter for parameter in group['params'] if id(parameter) in kept]
    empty = {index for index, group in enumerate(optimizer.param_groups) if not group['params']}
    optimizer.param_groups[:] = [group for index, group in enumerate(optimizer.param_groups) if index not in empty]
    for scheduler in schedulers:
        for name in ('base_values', '_last_value'):
            values = getattr(scheduler, name)
            setattr(scheduler, name, [value for index, value in enumerate(values) if index not in empty])
