"""Checks of a config that find the user's mistakes before anything is written and before training starts."""
import os
import os.path as osp
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from ..datasets import DigitScenesDataset
from ..models.layouts import take_wrapped_
from ..replacement import computing_layers
from ..replacement.start import LoadReport
from .checkpoint import load_checkpoint_
from .config import nested_dicts
from .errors import UserError
from .reading import safe_reading
from .search import check_search, searched_module

IMAGE_FOLDERS = ('ImageNet', 'CustomDataset')
"""mmpretrain's datasets that are a folder of images for each class."""


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
    texts = inspect_training(cfg, ignore_keys=ignore_keys, allow_pickle=allow_pickle)
    prepare_files(cfg, 'train', 'val')
    return texts


def inspect_training(cfg: Config, *, ignore_keys: Sequence[str] = (), allow_pickle: bool = False) -> list[str]:
    """The first half of :func:`check_training`, which looks at model and checkpoints and writes nothing."""
    model = build_model(cfg, allow_pickle)
    _check_distributed(cfg, model)
    check_search(cfg, model)
    reports = {f'{name}.replacement': module.replacement_report for name, module in model.named_modules()
               if getattr(module, 'replacement_report', None) is not None}
    options = dict(ignore=ignore_keys, allow_pickle=allow_pickle)
    for name, init in _pretrained_inits(model):
        with _named(f'{name}.init_cfg'):
            reports[f'{name}.init_cfg={init["checkpoint"]}'] = load_checkpoint_(
                model.get_submodule(name), init['checkpoint'], prefix=init.get('prefix') or '', **options)
    setting, path = _first_checkpoint(cfg)
    if path:
        with _named(setting):
            reports[f'{setting}={path}'] = load_checkpoint_(model, path, **options)
            if setting == 'resume' and reports[f'resume={path}'].fits:
                raise UserError(f"{path} is a baseline's, whose blocks are replaced here, so no training can be "
                                'resumed from it; to start from its weights, leave out --resume and use --cfg-options '
                                f'load_from={path}')
    if not (path and setting == 'resume'):
        _check_start(model, [report for report in reports.values() if isinstance(report, LoadReport)])
    return [f'{title}:\n{report}' for title, report in reports.items()]


def check_testing(cfg: Config, checkpoint: str, *, ignore_keys: Sequence[str] = (),
                  allow_pickle: bool = False) -> None:
    """Check a config and the checkpoint to be tested: model, checkpoint, data, work dir.

    Raises:
        UserError: the first mistake found; also a checkpoint of the baseline, whose blocks are replaced here.
    """
    model = build_model(cfg, allow_pickle)
    if searched_module(model) is not None:
        raise UserError(f'checkpoint: {checkpoint} wasn\'t saved after the search that the config asks for; '
                        'train until the search has ended, then test')
    with _named('checkpoint'):
        report = load_checkpoint_(model, checkpoint, ignore=ignore_keys, allow_pickle=allow_pickle)
    if report.fits:
        raise UserError(f'checkpoint: {checkpoint} has weights for {len(report.fits)} blocks that the config replaces '
                        f'({", ".join(list(report.fits)[:3])}): it is a baseline\'s; test it with the baseline\'s '
                        'config, or train from it with load_from')
    prepare_files(cfg, 'test')


def build_model(cfg: Config, allow_pickle: bool = False) -> nn.Module:
    """Build ``cfg.model`` on the CPU without initialising weights.

    Args:
        cfg: a config.
        allow_pickle: see :func:`~rl_mmdet.engine.safe_reading`; some detectors load a teacher while they are built.

    Raises:
        UserError: what the model's classes refuse, without the chain of classes that it went through.
    """
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    if cfg.get('model') is None:
        raise UserError('config: it has no model')
    try:
        with safe_reading(allow_pickle):
            model = MODELS.build(cfg.model)
    except (ValueError, TypeError, KeyError, AssertionError, ImportError, FileNotFoundError,
            UserError) as error:
        raise UserError(f'model: {_without_classes(error)}') from error
    if 'runner_type' not in cfg:
        take_wrapped_(model)  # as in the runner
    return model


def resume_checkpoint(cfg: Config) -> str | None:
    """The checkpoint that a run with this config will be resumed from, or None."""
    setting, path = _first_checkpoint(cfg)
    return path if setting == 'resume' else None


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


def check_data(cfg: Config, phase: str) -> None:
    """Check that the annotation files and image folders of a phase's loader and evaluator are there, or can be made."""
    nodes = list(nested_dicts(cfg.get(f'{phase}_dataloader') or {}))
    for node in nodes:
        root, prefix = node.get('data_root') or '', node.get('data_prefix')
        if node.get('ann_file'):
            _check_path(osp.join(root, node['ann_file']), osp.isfile, f'{phase}_dataloader.dataset.ann_file')
        if 'ann_file' in node and isinstance(prefix, Mapping) and prefix.get('img'):
            _check_path(osp.join(root, prefix['img']), osp.isdir, f'{phase}_dataloader.dataset.data_prefix.img')
        if node.get('type') in IMAGE_FOLDERS and not isinstance(prefix, Mapping):
            _check_path(osp.join(root, prefix or node.get('split') or ''), osp.isdir,
                        f'{phase}_dataloader.dataset.data_root')
    for node in nested_dicts(cfg.get(f'{phase}_evaluator') or {}):
        if node.get('ann_file') and not any(map(_is_digit_scenes, nodes)):
            _check_path(node['ann_file'], osp.isfile, f'{phase}_evaluator.ann_file')


def make_data(cfg: Config, phase: str) -> None:
    """Let the phase's digit scenes be drawn now, so that what is in their way shows before training."""
    for node in filter(_is_digit_scenes, nested_dicts(cfg.get(f'{phase}_dataloader') or {})):
        try:
            DATASETS.build(dict(node, lazy_init=True))
        except (ValueError, TypeError, OSError) as error:
            raise UserError(f'{phase}_dataloader.dataset: {_without_classes(error)}') from error


def _is_digit_scenes(node: Mapping[str, Any]) -> bool:
    return node.get('type') in (DigitScenesDataset, DigitScenesDataset.__name__)


def _check_path(path: str, exists: Callable[[str], bool], setting: str) -> None:
    if '://' not in path and not exists(path):
        raise UserError(f'{setting}: {path} doesn\'t exist (looked from {os.getcwd()}); put the data there or move '
                        'the config with --cfg-options data_root=DIR')


def _check_distributed(cfg: Config, model: nn.Module) -> None:
    """Coupled neighbours inside mmdet's reentrant checkpoints get their gradient in two backward passes."""
    coupled = [name for name, layer in computing_layers(model).items()
               if layer.checkpointed and layer.gradient.mode == 'coupled']
    wrapper = cfg.get('model_wrapper_cfg') or {}
    if cfg.get('launcher', 'none') != 'none' and coupled and not wrapper.get('static_graph'):
        raise UserError("replacement.gradient mode 'coupled' with with_cp=True on several GPUs needs a static graph: "
                        "add --cfg-options model_wrapper_cfg.type=MMDistributedDataParallel "
                        "model_wrapper_cfg.static_graph=True, or use mode 'detached'")


def _check_start(model: nn.Module, loaded: Sequence[LoadReport]) -> None:
    """A start that is fitted to the removed blocks needs their weights; without a fade, a replaced model's own do."""
    fitted = [layer.start for layer in computing_layers(model).values() if layer.start.keeps_block]
    if fitted and not loaded:
        raise UserError(f"replacement.start: {fitted[0]} needs a trained baseline's weights, and none are loaded; "
                        "set model.backbone.init_cfg=dict(type='Pretrained', checkpoint=FILE) or load_from=FILE, or "
                        'leave start out')
    if any(start.fade for start in fitted) and not loaded[-1].fits:
        raise UserError(f'replacement.start: {fitted[0]} needs the removed blocks, and the checkpoint is a replaced '
                        "model's own, which has none; load a baseline's, or set start.fade=0 to train on from it")


def _pretrained_inits(model: nn.Module) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The ``init_cfg`` of every module that loads a checkpoint, with the module's name."""
    for name, module in model.named_modules():
        inits = getattr(module, 'init_cfg', None) or []
        for init in [inits] if isinstance(inits, Mapping) else inits:
            if isinstance(init, Mapping) and init.get('type') in ('Pretrained', 'PretrainedInit'):
                yield name, init


def _first_checkpoint(cfg: Config) -> tuple[str, str | None]:
    """The setting because of which a run begins with a checkpoint, and the checkpoint's path, or None."""
    return 'resume' if cfg.get('resume') else 'load_from', cfg.get('load_from')


def _without_classes(error: Exception) -> str:
    """An error's text without the chain of classes that the registries put in front of it."""
    return re.sub(r'class `\w+` in \S+: ', '', str(error).strip('"\'')) or type(error).__name__


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Put the setting's name in front of a UserError's text."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{setting}: {error}') from error
