"""The checks as the tools call them."""
import os
import tempfile
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...folding.fold_norm import FoldingConv2d
from ...replacement.start import LoadReport
from ..checkpoint import load_checkpoint_
from ..errors import UserError
from ..search import check_search, searched_module
from .data import check_data, make_data
from .guard import named
from .keys import check_keys
from .model import build_model, check_distributed, check_start, first_checkpoint, pretrained_inits
from .rehearsal import rehearse
from .schedule import check_schedule


def check_training(cfg: Config, *, ignore_keys: Sequence[str] = (), allow_pickle: bool = False) -> list[str]:
    """Check a config before training: model, checkpoints, data, work dir; then make the digit scenes if it uses them.

    Args:
        cfg: what is to be trained.
        ignore_keys: regular expressions of tensors that may be missing in a checkpoint, or left over.
        allow_pickle: see :func:`~rl_mmdet.engine.read_checkpoint`.

    Returns:
        Texts for the log: what is replaced, and what each checkpoint is used for.

    Raises:
        UserError: the first mistake found. At most an empty work dir has been written then.
    """
    unread = check_keys(cfg)
    model, texts = _inspect(cfg, ignore_keys, allow_pickle)
    _rehearse(cfg, model, 'train', 'val')
    prepare_files(cfg, 'train', 'val')
    return texts + ([f'settings that nobody reads: {", ".join(unread)}'] if unread else [])


def inspect_training(cfg: Config, *, ignore_keys: Sequence[str] = (), allow_pickle: bool = False) -> list[str]:
    """The first half of :func:`check_training`, which looks at model and checkpoints and writes nothing."""
    return _inspect(cfg, ignore_keys, allow_pickle)[1]


def _inspect(cfg: Config, ignore_keys: Sequence[str], allow_pickle: bool) -> tuple[nn.Module, list[str]]:
    """The config's model, and the texts of :func:`check_training`."""
    init_default_scope(cfg.get('default_scope') or 'mmdet')  # in which the names of classes are looked up
    check_schedule(cfg)
    model = build_model(cfg, allow_pickle)
    check_distributed(cfg, model)
    check_search(cfg, model)
    reports = {f'{name}.replacement': f'{module.replacement_report}\n{_folded(module)}'
               for name, module in model.named_modules() if getattr(module, 'replacement_report', None) is not None}
    options = dict(ignore=ignore_keys, allow_pickle=allow_pickle)
    for name, init in pretrained_inits(model):
        with named(f'{name}.init_cfg'):
            reports[f'{name}.init_cfg={init["checkpoint"]}'] = load_checkpoint_(
                model.get_submodule(name), init['checkpoint'], prefix=init.get('prefix') or '', **options)
    setting, path = first_checkpoint(cfg)
    if path:
        with named(setting):
            reports[f'{setting}={path}'] = load_checkpoint_(model, path, **options)
            if setting == 'resume' and reports[f'resume={path}'].initialised:
                raise UserError(f"{path} is a baseline's, whose blocks are replaced here, so no training can be "
                                'resumed from it; to start from its weights, leave out --resume and use --cfg-options '
                                f'load_from={path}')
    if not (path and setting == 'resume'):
        check_start(model, [report for report in reports.values() if isinstance(report, LoadReport)])
    return model, [f'{title}:\n{report}' for title, report in reports.items()]


def _folded(backbone: nn.Module) -> str:
    """How many of a backbone's norms are folded."""
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    folded = sum(isinstance(module, FoldingConv2d) for module in backbone.modules())
    return f'fold_norm: {folded} of {len(norms)} BatchNorms are folded into the convolution before them'


def _rehearse(cfg: Config, model: nn.Module, *phases: str) -> None:
    """Check the data of some phases and :func:`rehearse` them, in one process of each machine."""
    for phase in phases:
        check_data(cfg, phase)
    if os.environ.get('SLURM_LOCALID' if cfg.get('launcher') == 'slurm' else 'LOCAL_RANK', '0') == '0':
        rehearse(cfg, model, *phases)


def check_testing(cfg: Config, checkpoint: str, *, ignore_keys: Sequence[str] = (),
                  allow_pickle: bool = False) -> None:
    """Check a config and the checkpoint to be tested: model, checkpoint, data, work dir.

    Raises:
        UserError: the first mistake found; also a checkpoint of the baseline, whose blocks are replaced here.
    """
    model = build_model(cfg, allow_pickle)
    with named('checkpoint'):
        report = load_checkpoint_(model, checkpoint, ignore=ignore_keys, allow_pickle=allow_pickle)
    if searched_module(model) is not None:
        raise UserError(f'checkpoint: {checkpoint} wasn\'t saved after the search that the config asks for; '
                        'train until the search has ended, then test')
    if report.initialised:
        raise UserError(f'checkpoint: {checkpoint} has weights for {len(report.initialised)} blocks that the config '
                        f'replaces ({", ".join(report.initialised[:3])}): it is a baseline\'s; test it with the '
                        'baseline\'s config, or train from it with load_from')
    prepare_files(cfg, 'test')


def prepare_files(cfg: Config, *phases: str) -> None:
    """Check the data of some phases, make the work dir, then make the digit scenes.

    Args:
        cfg: a config.
        phases: ``train``, ``val``, ``test``.

    Raises:
        UserError: the first mistake found.
    """
    for phase in phases:
        check_data(cfg, phase)
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.work_dir):
            pass
    except OSError as error:
        raise UserError(f'--work-dir {cfg.work_dir}: can\'t be written ({error.strerror})') from None
    for phase in phases:
        make_data(cfg, phase)
