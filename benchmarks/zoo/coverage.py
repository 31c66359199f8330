"""Many configs checked: each distinct model once, with a record that a later run goes on from."""
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import mmdet
import torch

from rl_mmdet.engine import UserError

from .check import FAILS, NOT_TRIED, Result
from .configs import ZooConfig, read_config
from .processes import check_in_parallel

VERSIONS = dict(mmdet=mmdet.__version__, torch=torch.__version__)


@dataclass(frozen=True)
class Outcome:
    """A config, and what came of its model."""
    config: ZooConfig
    result: Result


def check_configs(names: Iterable[str], *, workers: int = 2, limit: float = 900., stop_after: float = math.inf,
                  quick: bool = False, record: Path | None = None,
                  say: Callable[[str], None] = lambda line: None) -> list[Outcome]:
    """Check configs, each distinct model once.

    Args:
        names: of configs.
        workers: number of processes, each with one thread.
        limit: most seconds per model.
        stop_after: seconds after which no further model is begun; those left count as not tried.
        quick: see :func:`~zoo.check.check_steps`.
        record: a file with one result per line, as JSON: models found there are not run again, others are added.
        say: gets a line per model.

    Returns:
        Outcomes in the order of ``names``.
    """
    configs = [read_config(name) for name in names]
    shared = Counter(config.key for config in configs)
    results = {config.key: Result(config.name, FAILS, reason=config.reason) for config in configs if not config.model}
    results.update(_read(record))
    first = {config.key: config.name for config in reversed(configs) if config.key not in results}
    keys = {name: key for key, name in first.items()}
    say(f'{len(configs)} configs, {len(shared)} distinct models, {len(keys)} of them to be run')
    for count, result in enumerate(check_in_parallel(keys, workers, limit, stop_after, quick), 1):
        key = keys[result.config]
        results[key] = result
        _append(record, key, result)
        say(f'[{count}/{len(keys)}] {result.config} (of {shared[key]}): {describe(result)}')
    untried = Result('', NOT_TRIED, reason='no time for it yet')
    return [Outcome(config, results.get(config.key, untried)) for config in configs]


def describe(result: Result) -> str:
    """A result in one line."""
    rl = f'{result.rl} ({result.replaced} replaced)' if result.replaced else result.rl
    return f'baseline {result.baseline}, RL {rl}' + (f': {result.reason}' if result.reason else '')


def require_all(outcomes: Iterable[Outcome]) -> None:
    """Raise a UserError that names the configs which run, but not with replaced blocks."""
    failed = [outcome for outcome in outcomes if outcome.result.rl == FAILS]
    if failed:
        named = '; '.join(f'{outcome.config.name} ({outcome.result.reason})' for outcome in failed[:4])
        raise UserError(f'{len(failed)} configs run, but not with replaced blocks: {named}'
                        + (' ...' if len(failed) > 4 else ''))


def _read(record: Path | None) -> dict[str, Result]:
    """Results by key that were got with the same versions; a last line that was cut off counts as none."""
    results = {}
    for line in record.read_text().splitlines() if record is not None and record.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        key, versions = row.pop('key'), row.pop('versions')
        if versions == VERSIONS:
            results[key] = Result(**row)
    return results


def _append(record: Path | None, key: str, result: Result) -> None:
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open('a') as file:
            file.write(json.dumps(dict(key=key, versions=VERSIONS, **asdict(result))) + '\n')
