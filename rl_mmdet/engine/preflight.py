"""Preflight: find the user's mistakes before anything is written and before training starts."""
import os
import os.path as osp
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import find_latest_checkpoint
from torch import nn

from ..datasets import DigitScenesDataset
from ..replacement import computing_layers
from .checkpoint import check_checkpoint
from .config import nested_dicts
from .errors import UserError
from .search import check_search, searched_module


@dataclass
class Preflight:
    """What the checks found out, for the log.

    Args:
        replacements: replacement reports by module name.
        checkpoints: load reports by the setting that names the checkpoint.
    """
    replacements: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        for title, text in (self.replacements | self.checkpoints).items():
            yield f'{title}:\n{text}'


def check_training(cfg: Config, *, ignore_keys: Sequence[str] = (), allow_pickle: bool = False) -> Preflight:
    """Check a config before training: model, checkpoints, data, work dir; then make data that is made on first use.

    Raises:
        UserError: the first mistake found. At most an empty work dir has been written then.
    """
    found = inspect_training(cfg, ignore_keys=ignore_keys, allow_pickle=allow_pickle)
    prepare_files(cfg, 'train', 'val')
    return found


def inspect_training(cfg: Config, *, ignore_keys: Sequence[str] = (), allow_pickle: bool = False) -> Preflight:
    """The part of :func:`check_training` that leaves data and work dir alone: model and checkpoints.

    Raises:
        UserError: the first mistake found.
    """
    model = build_model(cfg)
    _check_distributed(cfg, model)
    check_search(cfg, model)
    found = Preflight(replacements=_replacement_reports(model))
    load = dict(ignore=ignore_keys, allow_pickle=allow_pickle)
    for name, init in _pretrained_cfgs(model):
        title = f'{name}.init_cfg={init["checkpoint"]}'
        with _named(title):
            report = check_checkpoint(model.get_submodule(name), init['checkpoint'], prefix=init.get('prefix') or '',
                                      **load)
        found.checkpoints[title] = str(report)
    source = load_source(cfg)
    if source:
        with _named(source):
            found.checkpoints[source] = str(check_checkpoint(model, source.split('=', 1)[1], **load))
    return found


def check_testing(cfg: Config, checkpoint: str, *, allow_pickle: bool = False) -> None:
    """Check a config before testing.

    Raises:
        UserError: as for :func:`check_training`; also a baseline's checkpoint for a replaced model.
    """
    model = build_model(cfg)
    if searched_module(model) is not None:
        raise UserError(f'checkpoint: {checkpoint} wasn\'t saved after the search that the config asks for; '
                        'train until the search has ended, then test')
    with _named('checkpoint'):
        report = check_checkpoint(model, checkpoint, allow_pickle=allow_pickle)
    if report.fits:
        raise UserError(f'checkpoint: {checkpoint} has weights for {len(report.fits)} blocks that the config replaces '
                        f'({", ".join(list(report.fits)[:3])}): it is a baseline\'s; test it with the baseline\'s '
                        'config, or train from it with load_from')
    prepare_files(cfg, 'test')


def build_model(cfg: Config) -> nn.Module:
    """Build ``cfg.model`` on the CPU without initialising weights.

    Raises:
        UserError: what the model's classes refuse, without the chain of classes that it went through.
    """
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    if cfg.get('model') is None:
        raise UserError('config: it has no model')
    try:
        return MODELS.build(cfg.model)
    except (ValueError, TypeError, KeyError, AssertionError, ImportError, FileNotFoundError) as error:
        raise UserError(f'model: {_without_classes(error)}') from error


def check_data(cfg: Config, phase: str) -> None:
    """Check that the annotation files and image folders of one phase's loader and evaluator exist, or will be made."""
    nodes = list(nested_dicts(cfg.get(f'{phase}_dataloader') or {}))
    for node in nodes:
        if 'ann_file' in node:
            _check_dataset(node, f'{phase}_dataloader')
    for node in nested_dicts(cfg.get(f'{phase}_evaluator') or {}):
        if node.get('ann_file') and not any(map(_makes_own_files, nodes)):
            _check_path(node['ann_file'], osp.isfile, f'{phase}_evaluator.ann_file')


def make_data(cfg: Config, phase: str) -> None:
    """Let the datasets of one phase that make their own files do so."""
    for node in nested_dicts(cfg.get(f'{phase}_dataloader') or {}):
        if _makes_own_files(node):
            _make_files(node, f'{phase}_dataloader')


def check_work_dir(path: str) -> None:
    """Make the work dir and try to write in it."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f'--work-dir {path}: can\'t be written ({error.strerror})') from None


def prepare_files(cfg: Config, *phases: str) -> None:
    """Check the data of some phases, then the work dir, which is made; then make data that is made on first use.

    Raises:
        UserError: the first mistake found.
    """
    for phase in phases:
        check_data(cfg, phase)
    check_work_dir(cfg.work_dir)
    for phase in phases:
        make_data(cfg, phase)


def _check_dataset(node: Mapping[str, Any], where: str) -> None:
    root = node.get('data_root') or ''
    if node['ann_file']:
        _check_path(osp.join(root, node['ann_file']), osp.isfile, f'{where}.dataset.ann_file')
    prefix = node.get('data_prefix')
    if isinstance(prefix, Mapping) and prefix.get('img'):
        _check_path(osp.join(root, prefix['img']), osp.isdir, f'{where}.dataset.data_prefix.img')


def _check_path(path: str, exists: Any, setting: str) -> None:
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


def _makes_own_files(node: Mapping[str, Any]) -> bool:
    cls = node.get('type')
    cls = DATASETS.get(cls) if isinstance(cls, str) and cls.endswith('Dataset') else cls
    return isinstance(cls, type) and issubclass(cls, DigitScenesDataset)


def _make_files(node: Mapping[str, Any], where: str) -> None:
    """Let a dataset that makes its own files do so now, so that what is in its way shows before training."""
    try:
        DATASETS.build(dict(node, lazy_init=True))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f'{where}.dataset: {_without_classes(error)}') from error


def _pretrained_cfgs(model: nn.Module) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, module in model.named_modules():
        inits = getattr(module, 'init_cfg', None) or []
        for init in [inits] if isinstance(inits, Mapping) else inits:
            if isinstance(init, Mapping) and init.get('type') in ('Pretrained', 'PretrainedInit'):
                yield name, init


def resume_source(cfg: Config) -> str | None:
    """The checkpoint that the run will be resumed from, if it is."""
    source = load_source(cfg)
    return source.removeprefix('resume=') if source and source.startswith('resume=') else None


def load_source(cfg: Config) -> str | None:
    """The checkpoint that the run will start from, as ``setting=path``."""
    if cfg.get('load_from'):
        return f'{"resume" if cfg.get("resume") else "load_from"}={cfg.load_from}'
    latest = find_latest_checkpoint(cfg.work_dir) if cfg.get('resume') and osp.isdir(cfg.work_dir) else None
    return f'resume={latest}' if latest else None


def _replacement_reports(model: nn.Module) -> dict[str, str]:
    reports = {name: getattr(module, 'replacement_report', None) for name, module in model.named_modules()}
    return {f'{name}.replacement': str(report) for name, report in reports.items() if report is not None}


def _without_classes(error: Exception) -> str:
    """An error's text without the chain of classes that the registries put in front of it."""
    return re.sub(r'class `\w+` in \S+: ', '', str(error).strip('"\'')) or type(error).__name__


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Put the setting's name in front of a UserError's text."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{setting.split("=", 1)[0]}: {error}') from error
