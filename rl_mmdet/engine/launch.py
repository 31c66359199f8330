"""Building a run, and ending a tool with one clear line instead of a traceback."""
import errno
import gc
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable

import torch
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.distributed import DistBackendError

from .errors import UserError, first_line, show
from .reading import safe_reading

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Why a file can't be written at any time: the disk, a quota or a limit is full, or it became read-only."""

GONE = re.compile('[Cc]onnection (closed|reset) by peer|gloo/transport')
"""What gloo says, in a RuntimeError, when it doesn't reach another process."""
MISSING = re.compile(r"No such file or directory: '([^'\n]+)'")
"""What is said of a file in a loader's process."""


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
    wrapper = ConfigDict(type='MMDistributedDataParallel', broadcast_buffers=False,
                         find_unused_parameters=cfg.get('find_unused_parameters', False))
    wrapper.update(cfg.get('model_wrapper_cfg') or {}, device_ids=None)
    cfg.model_wrapper_cfg = wrapper


def run_tool(main: Callable[[Namespace], None], args: Namespace) -> None:
    """Call a tool's ``main`` with its arguments.

    A UserError, a full disk, a missing file or a process of the run that is gone ends it with one line on stderr and
    exit status 1, Ctrl-C with 130; of several processes each that fails says so. ``RL_MMDET_TRACEBACK=1`` in the
    environment shows tracebacks. No file that is read runs code (:func:`~rl_mmdet.engine.safe_reading`), unless the
    arguments have ``allow_pickle``.
    """
    status, together = 0, True
    try:
        with safe_reading(getattr(args, 'allow_pickle', False)):
            main(args)
    except (UserError, KeyboardInterrupt, OSError, RuntimeError) as error:
        if os.environ.get('RL_MMDET_TRACEBACK') == '1' or not (line := _line(error)):
            raise
        show(line)
        interrupted = isinstance(error, KeyboardInterrupt)
        status, together = (130, bool(error.args)) if interrupted else (1, False)
    if together and torch.distributed.is_initialized():
        _end_together()
    if status:
        sys.exit(status)


def _line(error: BaseException) -> str:
    """What a user is told of an error; nothing if its traceback says more."""
    if isinstance(error, KeyboardInterrupt):
        return f'interrupted {error}'.rstrip()
    if isinstance(error, UserError) or isinstance(error, OSError) and error.errno in NO_ROOM:
        return f'error: {error}'
    if isinstance(error, FileNotFoundError):  # from a loader's process it comes as a text with a traceback
        name = error.filename or (MISSING.findall(str(error)) or [''])[-1]
        return f'error: {name}: there is no such file; was it moved or deleted meanwhile?' if name else ''
    if torch.distributed.is_initialized() and (isinstance(error, DistBackendError) or GONE.search(str(error))):
        return (f'error: another process of the run has ended or can\'t be reached ({first_line(error)}); its machine '
                'may say why. What is saved is whole: --resume goes on from it')
    return ''


def _end_together() -> None:
    """End the group of torchrun's processes when all have come to their end, and nothing is left that uses it."""
    torch.distributed.barrier()
    gc.collect()  # DDP is in reference cycles; a group that outlives the interpreter's threads aborts the process
    torch.distributed.destroy_process_group()
