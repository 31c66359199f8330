"""Building a run, and ending a tool with one clear line instead of a traceback."""
import os
import sys
from collections.abc import Callable, Iterable
from functools import wraps

import torch
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .errors import UserError, show


def build_runner(cfg: Config, texts: Iterable[str] = ()) -> Runner:
    """Build the config's runner and put ``texts`` at the top of its log."""
    setup_cache_size_limit_of_dynamo()
    if cfg.get('launcher') == 'pytorch' and not torch.cuda.is_available():
        _start_cpu_processes_(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    for text in texts:
        runner.logger.info(text)
    return runner


def _start_cpu_processes_(cfg: Config) -> None:
    """Join torchrun's processes on a machine without GPU; MMEngine's own way asks for CUDA devices."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    wrapper = dict(type='MMDistributedDataParallel', broadcast_buffers=False,
                   find_unused_parameters=cfg.get('find_unused_parameters', False))
    cfg.model_wrapper_cfg = ConfigDict(wrapper | dict(cfg.get('model_wrapper_cfg') or {}) | dict(device_ids=None))


def tool(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a tool's ``main``: a UserError ends it with one line on stderr and exit status 1, Ctrl-C with 130.

    Of several processes each that fails says so. ``RL_MMDET_TRACEBACK=1`` in the environment shows tracebacks.
    """
    @wraps(main)
    def run() -> None:
        try:
            main()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # as PyTorch asks for before a process ends
        except (UserError, KeyboardInterrupt) as error:
            if os.environ.get('RL_MMDET_TRACEBACK') == '1':
                raise
            interrupted = isinstance(error, KeyboardInterrupt)
            show('interrupted' if interrupted else f'error: {error}')
            sys.exit(130 if interrupted else 1)
    return run
