"""What is compared: a baseline and its variants, each a resolved config, in one folder that belongs to them."""
import argparse
import contextlib
import copy
import fcntl
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from torch.utils.data import Dataset

from ...engine import UserError, add_rl_defaults_, inspect_training, load_config
from ...engine.config import add_import_, uses_replacement
from ...engine.files import write_text
from ...engine.preflight import prepare_files
from .same_question import check_same_question, coco_evaluator, differing, metrics_of

FORMAT = 'rl_mmdet.comparison/1'
LOCK = '.lock'
"""File that the process at work in a comparison's folder holds."""
RECORD = {'variants', 'seeds', 'commands', 'classes'}
"""What the record of a comparison has."""


@dataclass(frozen=True)
class Variant:
    """One of the detectors that are compared.

    Args:
        name: how it is called everywhere.
        source: the config file it comes from.
        options: what was changed in that file, by dotted key.
    """
    name: str
    source: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training of a variant; all that it leaves lies in ``folder``."""
    variant: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f'{self.variant}, seed {self.seed}'


class Comparison:
    """The folder of a comparison.

    It has ``comparison.json`` (variants, number of seeds, classes, commands), ``configs/`` (each variant's resolved
    config), and ``runs/<variant>/seed_<n>/``.

    Args:
        folder: an existing comparison's.

    Raises:
        UserError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = _read_record(folder)
        if not content:
            raise UserError(f'--work-dir {folder}: there is no comparison in it (no comparison.json)')
        self.variants = [Variant(**each) for each in content['variants']]
        self.seeds: int = content['seeds']
        self.commands: list[str] = content['commands']
        self.classes: list[str] = content['classes']

    @property
    def baseline(self) -> str:
        return self.variants[0].name

    def config_file(self, variant: str) -> Path:
        return _config_file(self.folder, variant)

    def config(self, variant: str) -> Config:
        """The variant's config with the defaults that tools/train.py adds."""
        return add_rl_defaults_(load_config(str(self.config_file(variant)), work_dir=str(self.folder)))

    def runs(self) -> list[Run]:
        """Every training there is to be, all variants with one seed before the next seed."""
        return [Run(variant.name, seed, self.folder / 'runs' / variant.name / f'seed_{seed}')
                for seed in range(self.seeds) for variant in self.variants]

    def metrics(self) -> list[str]:
        """``'bbox'``, ``'segm'`` or both."""
        return metrics_of(self._baseline_config)

    def annotations(self) -> Path:
        """The val set's annotation file."""
        return Path(coco_evaluator(self._baseline_config)['ann_file'])

    @cached_property
    def _baseline_config(self) -> Config:
        return self.config(self.baseline)


def plan_comparison(folder: Path, configs: Sequence[str],
                    variants: Mapping[str, Mapping[str, Any]] | None = None, seeds: int = 3,
                    options: Mapping[str, Any] | None = None, ignore_keys: Sequence[str] = (),
                    allow_pickle: bool = False, command: str = '') -> Comparison:
    """Check everything, then make the folder of a comparison, or add to the one that is there.

    Args:
        folder: where everything is written. If it has a comparison with the same baseline, its variants and
            seeds stay, and what is new is added.
        configs: config files, the baseline's first. Each is called like its file, or otherwise with ``NAME=FILE``.
        variants: variants by name, each as changes of the baseline's config by dotted key.
        seeds: trainings of each variant, with the seeds 0, 1, ...
        options: changes of all configs.
        ignore_keys, allow_pickle: see :func:`rl_mmdet.engine.inspect_training`.
        command: what the user typed, to be kept for the report.

    Raises:
        UserError: nothing to compare, a name given twice, a config that can't be trained or whose val set or
            metric differs from the baseline's, or a folder with something else in it.
    """
    if not configs:
        raise UserError('no config file is given: the baseline\'s comes first')
    if seeds < 1:
        raise UserError(f'--seeds must be at least 1, got {seeds}')
    found = _variants(configs, variants or {}, dict(options or {}))
    if len(found) < 2:
        raise UserError('there is nothing to compare with the baseline: give config files of variants or --variant')
    cfgs = {name: _load(variant) for name, variant in found.items()}
    record = _read_record(folder)
    if (folder / LOCK).is_file():
        with only_one(folder):  # else what is at work there would go on with this call's variants
            pass
    _check_folder(folder, record, cfgs)
    check_same_question(cfgs)
    for cfg in cfgs.values():
        cfg.work_dir = str(folder)
    _check_each(cfgs, lambda cfg: inspect_training(cfg, ignore_keys=ignore_keys, allow_pickle=allow_pickle))
    try:
        _check_each(cfgs, lambda cfg: prepare_files(cfg, 'train', 'val'))  # which makes the folder
    except KeyboardInterrupt:
        if folder.is_dir():
            (folder / LOCK).touch()  # so that the next call knows the data that are begun there for a comparison's
        raise
    for name, cfg in cfgs.items():
        path = _config_file(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _text(cfg))
    known = record.get('variants', [])
    names = [each['name'] for each in known]
    content = dict(format=FORMAT, classes=list(val_dataset(next(iter(cfgs.values()))).metainfo['classes']),
                   seeds=max(seeds, record.get('seeds', 0)),
                   variants=known + [vars(found[name]) for name in found if name not in names],
                   commands=list(dict.fromkeys(record.get('commands', []) + [command] * bool(command))))
    write_text(folder / 'comparison.json', json.dumps(content, indent=2))
    return Comparison(folder)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep the folder of a comparison for this process.

    Raises:
        UserError: another process works in it.
    """
    with (folder / LOCK).open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f'--work-dir {folder}: another comparison is at work in it; wait for its end') from None
        yield


def val_dataset(cfg: Config) -> Dataset:
    """The val set as it is before its annotations are read."""
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    return DATASETS.build(dict(cfg.val_dataloader.dataset, lazy_init=True))


def parse_variants(given: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """The values of ``--variant NAME KEY=VALUE ...`` by name, each read as ``--cfg-options`` is.

    Raises:
        UserError: a name that is there twice, or a value that isn't KEY=VALUE.
    """
    found: dict[str, dict[str, Any]] = {}
    reader = argparse.ArgumentParser()
    reader.add_argument('--cfg-options', nargs='*', action=DictAction, default={})
    for name, *changes in given:
        wrong = [change for change in changes if not re.match(r'[\w.]+=(?!dict\(|{)', change)]
        if wrong or '=' in name:
            raise UserError(f'--variant NAME KEY=VALUE ...: got {wrong[0] if wrong else name!r}'
                            + ('; write each key of a dict by itself' if wrong and '=' in wrong[0] else ''))
        if name in found:
            raise UserError(f'--variant {name} is there twice')
        found[name] = reader.parse_args(['--cfg-options', *changes]).cfg_options if changes else {}
    return found


def _variants(configs: Sequence[str], variants: Mapping[str, Mapping[str, Any]],
              options: dict[str, Any]) -> dict[str, Variant]:
    """All that is to be compared by name, the baseline first."""
    files = []
    for given in configs:
        name, sign, file = given.partition('=')
        files.append((name, file) if sign and '/' not in name else (Path(given).stem, given))
    asked = [Variant(name, file, options) for name, file in files]
    asked += [Variant(name, files[0][1], options | dict(changes)) for name, changes in variants.items()]
    found: dict[str, Variant] = {}
    for variant in asked:
        if not re.fullmatch(r'\w[\w.+=, -]*', variant.name):
            raise UserError(f'{variant.name!r} can\'t be the name of a variant: it names a folder, so it has letters, '
                            'digits and any of "_.+=,- " only')
        if variant.name in found:
            raise UserError(f'{variant.name} is there twice; every config file and --variant needs a name of its own')
        found[variant.name] = variant
    return found


def _load(variant: Variant) -> Config:
    """The variant's config, which MMDetection's own tools can read, too."""
    try:
        cfg = load_config(variant.source, variant.options)
    except UserError as error:
        raise UserError(f'{variant.name}: {error}') from error
    if uses_replacement(cfg):
        add_import_(cfg)
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    if isinstance(hook, Mapping):
        hook.pop('out_dir', None)  # there all variants would go on from each other's checkpoints
    return cfg


def _check_each(cfgs: Mapping[str, Config], check: Callable[[Config], object]) -> None:
    """Check a copy of every config: building a model changes its config."""
    for name, cfg in cfgs.items():
        try:
            check(copy.deepcopy(cfg))
        except UserError as error:
            raise UserError(f'{name}: {error}') from error


def _check_folder(folder: Path, record: Mapping[str, Any], cfgs: Mapping[str, Config]) -> None:
    """Raise a UserError if the folder is another comparison's or has other files in it."""
    if not record:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / LOCK).is_file():
            raise UserError(f'--work-dir {folder}: it has files in it that no comparison made; give another folder')
        return
    first = record['variants'][0]['name']
    if first != next(iter(cfgs)):
        raise UserError(f'--work-dir {folder}: it has the comparison of another baseline, {first}; give another folder')
    for name, cfg in cfgs.items():
        path = _config_file(folder, name)
        if path.is_file():
            before, now = Config.fromfile(str(path)), Config.fromstring(_text(cfg), '.py')
            for key, old, new in differing(before.to_dict(), now.to_dict()):
                raise UserError(f'--work-dir {folder}: {name} was begun there with {key}={old!r}, now it is {new!r}; '
                                'give another folder')


def _text(cfg: Config) -> str:
    """The config as a file, without what belongs to one run."""
    own = Config({key: value for key, value in cfg.to_dict().items() if key not in ('work_dir', 'launcher')})
    return own.pretty_text


def _config_file(folder: Path, variant: str) -> Path:
    return folder / 'configs' / f'{variant}.py'


def _read_record(folder: Path) -> dict[str, Any]:
    """The content of comparison.json, empty if there is none."""
    path = folder / 'comparison.json'
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: can\'t be read ({error})') from error
    if not isinstance(content, dict) or content.get('format') != FORMAT or not content.keys() >= RECORD:
        raise UserError(f'{path}: not the record of a comparison that this version can read ({FORMAT})')
    return content
