"""What a report holds: everything that a comparison found, read from its folder, as it goes into report.json."""
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ...engine import UserError
from .bootstrap import paired_interval
from .coco_scores import METRICS, Scores
from .comparison import Comparison, Run, Variant
from .costs import Cost, environment, read_costs
from .differences import Difference, Spread, difference, spread
from .runs import checkpoint_of, complaint_of, resampled_of, scores_of

FORMAT = 'rl_mmdet.report/3'
FIELDS = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large')


@dataclass(frozen=True)
class RunResult:
    """One training.

    Args:
        variant, seed: which.
        status: ``'finished'``, ``'failed'`` or ``'unfinished'``.
        error: why it failed.
        scores: by metric, if it is finished.
        curves: (iteration or epoch, AP) during the training, by metric.
        folder: below the comparison's folder.
        checkpoint: the last one's file name.
    """
    variant: str
    seed: int
    status: str
    error: str | None
    scores: dict[str, Scores]
    curves: dict[str, list[tuple[float, float]]]
    folder: str
    checkpoint: str | None

    @property
    def reason(self) -> str:
        """Why it failed, in a line: the last one of what the training wrote."""
        return self.error.splitlines()[-1] if self.error else ''


@dataclass(frozen=True)
class VariantResult:
    """A variant over all its seeds.

    Args:
        name, source, options: see :class:`~.comparison.Variant`.
        scores: for each metric, each of ``FIELDS`` over the finished seeds; None where it isn't defined.
        difference: for each metric, AP minus the baseline's; empty for the baseline and without scores.
        cost: what a step and a prediction cost; None if that wasn't measured.
        cost_error: why it couldn't be measured.
    """
    name: str
    source: str
    options: dict[str, Any]
    scores: dict[str, dict[str, Spread | None]] = field(default_factory=dict)
    difference: dict[str, Difference] = field(default_factory=dict)
    cost: Cost | None = None
    cost_error: str | None = None


@dataclass(frozen=True)
class Contents:
    """All of a report.

    Args:
        commands: the calls that made the comparison.
        environment: the device that costs were measured on, and versions.
        date: of the last result, as 2026-01-31; empty before the first.
        data: the val set's annotation file.
        images, objects: size of the val set; None before the first run is finished.
        metrics: ``'bbox'``, ``'segm'`` or both.
        seeds: how many trainings of each variant there are to be.
        variants: the baseline first.
        runs: all trainings.
        format: of this record.
    """
    commands: list[str]
    environment: dict[str, str]
    date: str
    data: str
    images: int | None
    objects: int | None
    metrics: list[str]
    seeds: int
    variants: list[VariantResult]
    runs: list[RunResult]
    format: str = FORMAT

    @property
    def baseline(self) -> VariantResult:
        return self.variants[0]

    def runs_of(self, variant: str) -> list[RunResult]:
        return [run for run in self.runs if run.variant == variant]

    def as_json(self) -> str:
        """What report.json holds; docs/compare.md describes it."""
        return json.dumps(_plain(asdict(self)), indent=1, allow_nan=False)


def collect(comparison: Comparison) -> Contents:
    """Read all that a comparison has found so far; nothing is written.

    Raises:
        UserError: trainings were scored on different annotations.
    """
    costs = read_costs(comparison.folder)
    results = {run: _run_result(comparison, run) for run in comparison.runs()}
    metrics = comparison.metrics()
    finished = [run for run, result in results.items() if result.status == 'finished']
    first = results[finished[0]].scores[metrics[0]] if finished else None
    for run in finished:
        scores = results[run].scores[metrics[0]]
        if (scores.images, scores.objects) != (first.images, first.objects):
            raise UserError(f'{run}: it was scored on other annotations than {finished[0]}; delete '
                            f'{run.folder / "scores.json"} and start again')
    variants = [_variant_result(variant, comparison.baseline, results, metrics, costs['costs'].get(variant.name))
                for variant in comparison.variants]
    return Contents(
        commands=comparison.commands, environment=costs['environment'] or environment(),
        date=_last_date([comparison.folder / 'costs.json', *(run.folder / 'scores.json' for run in results)]),
        data=str(comparison.annotations()), images=first and first.images, objects=first and first.objects,
        metrics=metrics, seeds=comparison.seeds, variants=variants, runs=list(results.values()))


def _last_date(files: Iterable[Path]) -> str:
    """The day on which the last of the files was written, empty if there is none."""
    times = [file.stat().st_mtime for file in files if file.is_file()]
    return date.fromtimestamp(max(times)).isoformat() if times else ''


def _run_result(comparison: Comparison, run: Run) -> RunResult:
    scores, checkpoint = scores_of(run), checkpoint_of(run)
    complaint = complaint_of(run)
    error = complaint.read_text(encoding='utf-8').strip() if complaint.is_file() else None
    return RunResult(
        run.variant, run.seed, 'finished' if scores else 'failed' if error else 'unfinished', error, scores or {},
        _curves(run.folder), str(run.folder.relative_to(comparison.folder)), checkpoint and checkpoint.name)


def _curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """AP during a training by metric, from MMEngine's logs in its work dir; a resumed one has several, the last counts.

    A last line that isn't whole, as a killed process leaves it, is passed over.
    """
    found: dict[str, dict[float, float]] = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            for metric in METRICS:
                if f'coco/{metric}_mAP' in line:
                    found.setdefault(metric, {})[line['step']] = max(0., line[f'coco/{metric}_mAP'])
    return {metric: sorted(curve.items()) for metric, curve in found.items()}


def _variant_result(variant: Variant, baseline: str, results: dict[Run, RunResult], metrics: list[str],
                    cost: Cost | str | None) -> VariantResult:
    """What the variant's finished trainings give, and how it differs from the baseline."""
    own, reference = ([run for run, result in results.items() if run.variant == name and result.status == 'finished']
                      for name in (variant.name, baseline))
    measured = not isinstance(cost, str)
    found = VariantResult(**vars(variant), cost=cost if measured else None, cost_error=None if measured else cost)
    for metric in metrics if own else ():
        scores = [results[run].scores[metric] for run in own]
        found.scores[metric] = {name: _spread([getattr(each, name) for each in scores]) for name in FIELDS}
        ap = found.scores[metric]['ap']
        if variant.name != baseline and reference and ap is not None:
            images = None
            if min(len(reference), len(own)) > 1:
                images = paired_interval(*([resampled_of(run, metric) for run in runs] for runs in (reference, own)))
            baselines = spread([results[run].scores[metric].ap for run in reference])
            found.difference[metric] = difference(baselines, ap, images)
    return found


def _spread(values: list[float | None]) -> Spread | None:
    """None if one of the values isn't defined."""
    return None if None in values else spread(values)


def _plain(value: Any) -> Any:
    """The same for JSON, which has no numbers that aren't finite."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
