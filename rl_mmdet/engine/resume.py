"""Which checkpoint a run goes on from, and whether its work dir is free for a new one."""
import os.path as osp
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from .errors import UserError
from .reading import meta_of, read_checkpoint

LAST = 'last_checkpoint'
"""MMEngine's file with the path of the last checkpoint."""
INTERRUPTED = 'interrupted.pth'
"""The checkpoint of a training that was stopped by a signal."""


def begin_or_resume_(cfg: Config, given: str | None, allow_pickle: bool = False) -> list[str]:
    """``--resume [FILE]``: let a run go on from ``FILE``, or for ``'auto'`` from the newest checkpoint in its work dir.

    Without such a checkpoint it begins, from the config's ``load_from`` if it has one. The seed is the checkpoint's,
    also where it was drawn, since the config has none.

    Args:
        cfg: the config, changed in place.
        given: None where ``--resume`` isn't given; then the config's own ``resume`` counts.
        allow_pickle: see :func:`~rl_mmdet.engine.read_checkpoint`.

    Returns:
        Texts for the log: where it goes on, and which files that can't be read were passed over.

    Raises:
        UserError: not to be resumed, and the work dir has a training's checkpoints, which the new one would replace;
            there are checkpoints and none can be read; or ``FILE`` can't be read or isn't from a training.
    """
    given = given or (cfg.get('resume') and (cfg.get('load_from') or 'auto'))
    if not given:
        _check_unused(cfg)
        return []
    passed = []
    for path in own_checkpoints(cfg) if given == 'auto' else [given]:
        try:
            meta = _resumable(str(path), allow_pickle)['meta']
        except UserError as error:
            passed.append(f'--resume: {error}')
            continue
        cfg.resume, cfg.load_from = True, str(path)
        return passed + [f'--resume: goes on from {path}, after iteration {meta["iter"]}', *_keep_seed_(cfg, meta)]
    if given != 'auto':
        raise UserError(passed[0])
    if passed:
        raise UserError(f'{passed[0]}; no other checkpoint in {cfg.work_dir} can be read: to begin again, name another '
                        '--work-dir or delete it')
    cfg.resume = False
    return [f'--resume: there is no checkpoint in {cfg.work_dir}, so the training begins']


def _check_unused(cfg: Config) -> None:
    """Raise a UserError if the work dir has a training's checkpoints."""
    found = own_checkpoints(cfg)
    if found:
        raise UserError(f'--work-dir {cfg.work_dir}: it has a training in it already ({found[0].name}); add --resume '
                        'to go on with it, or name another --work-dir')


def own_checkpoints(cfg: Config) -> list[Path]:
    """The checkpoints of a config's own training, newest first."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    beside = hook.get('out_dir') and osp.join(hook['out_dir'], osp.basename(osp.normpath(cfg.work_dir)))
    return checkpoints_in(cfg.work_dir, *([beside] if beside else []))


def checkpoints_in(work_dir: str | Path, *more: str | Path) -> list[Path]:
    """The checkpoints that a training has saved in its work dir and in more folders, newest first, without best ones.

    Of several with the same kind of name the higher number is newer, also where a copied folder has new times; but what
    is older than the one that ``last_checkpoint`` names is from before somebody went back, and comes last. Where there
    are none, it is the one that is named.
    """
    marker = Path(work_dir, LAST)
    named = Path(marker.read_text().strip()) if marker.is_file() else Path()
    kinds = {_kind(name) for name in ('epoch_1.pth', 'iter_1.pth', INTERRUPTED, *[named.name] * bool(named.name))}
    series = defaultdict(list)
    for path in (each for folder in (work_dir, *more) for each in Path(folder).glob('*')):
        if _kind(path.name) in kinds:
            series[_kind(path.name)].append((int(''.join(re.findall(r'\d+', path.name)[-1:]) or 0), path))
    ordered = sorted(series.values(), key=lambda each: max(path.stat().st_mtime for _, path in each), reverse=True)
    left = _left_behind(series.get(_kind(named.name), ()), named.name)
    return [path for each in ordered for _, path in sorted(
        each, key=lambda entry: (entry[1] not in left, *entry), reverse=True)] or [named] * named.is_file()


def _left_behind(entries: Iterable[tuple[int, Path]], name: str) -> set[Path]:
    """Those of higher numbers than the one of this name that are older: somebody has gone back behind them."""
    last = next(((number, path.stat().st_mtime) for number, path in entries if path.name == name), None)
    return {path for number, path in entries if last and number > last[0] and path.stat().st_mtime < last[1]}


def _kind(name: str) -> str:
    """A file's name without its numbers."""
    return re.sub(r'\d+', '', name)


def _resumable(path: str, allow_pickle: bool) -> Mapping[str, Any]:
    """Read a checkpoint of a training that can go on."""
    checkpoint = read_checkpoint(path, allow_pickle)
    if not {'epoch', 'iter'} <= set(meta_of(checkpoint)) or 'message_hub' not in checkpoint:
        raise UserError(f'{path} has weights alone, so no training can be resumed from it; to start from its weights, '
                        f'leave out --resume and use --cfg-options load_from={path}')
    return checkpoint


def _keep_seed_(cfg: Config, meta: Mapping[str, Any]) -> list[str]:
    """Let the config have the checkpoint's seed; a text if it had another one."""
    randomness, seed = dict(cfg.get('randomness') or {}), meta.get('seed')
    if seed is None or randomness.get('seed') == seed:
        return []
    cfg.randomness = ConfigDict(randomness | dict(seed=seed))
    return [f'randomness.seed: the checkpoint\'s {seed} is kept, not {randomness["seed"]}'] \
        if randomness.get('seed') is not None else []
