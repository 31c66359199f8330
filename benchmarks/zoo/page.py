"""The result page: which of mmdet's configs run with replaced backbones."""
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from .check import FAILS, NO_BLOCK, NOT_TRIED, RUNS, SIZES, Result
from .coverage import VERSIONS, Outcome

METHOD = f"""\
Each config's model is built as the config has it, without pretrained weights, then makes one training step and one
prediction. Then the same is done with replaced backbones: all that learn, each by `RLBackbone`, with all its other
settings, RL-v1 that learns in every step, `EveryKth(k=2)`, or its first replaceable block where that replaces none.
Nothing else is changed.
*Runs* means: it can be built, all losses are finite, every replaced block gets a finite gradient if the baseline's
block gets one, and there is a prediction. It says nothing of accuracy.

The images are synthetic, of {SIZES[0]}x{SIZES[0]} pixels ({SIZES[1]} or {SIZES[2]} where a model can't take smaller
ones), with one or two objects each. The same for both: plain SGD in place of the config's optimizer, BatchNorm in place
of its synchronised form, images of their own size where a config pads or resizes whole batches; trackers that mmdet
doesn't train as a whole train their detector; the box regressors of QueryInst and Sparse R-CNN start from zero, because
mmdet can't paste the masks of boxes outside of the image on a CPU. Configs whose models are equal share one run. mmdet
leaves the weights of TridentNet's convolutions to whatever is in memory, so its configs run, or give nan, by chance,
with replacement or without."""


def coverage_page(outcomes: Sequence[Outcome], command: str) -> str:
    """The page as Markdown; ``command`` is what makes it."""
    versions = ', '.join(f'{name} {version}' for name, version in VERSIONS.items())
    parts = ['# Which of MMDetection\'s configs run with Replacement Learning',
             f'Made by `{command}`: {versions}, CPU.',
             summary(outcomes), METHOD,
             '## By folder', _table('folder', outcomes, lambda outcome: outcome.config.family),
             '## By backbone', _table('backbone', outcomes, lambda outcome: outcome.config.backbones),
             '## Replaced, but doesn\'t run', _by_reason(outcomes, lambda result: result.rl == FAILS),
             '## No replaceable block', 'What the replacement says, and where:',
             _by_reason(outcomes, lambda result: result.rl == NO_BLOCK),
             '## The baseline itself doesn\'t run', _by_reason(outcomes, lambda result: result.baseline == FAILS)]
    if any(outcome.result.baseline == NOT_TRIED for outcome in outcomes):
        parts += ['## Not tried', _by_reason(outcomes, lambda result: result.baseline == NOT_TRIED)]
    return '\n\n'.join(parts) + '\n'


def summary(outcomes: Sequence[Outcome]) -> str:
    """All of it in two sentences."""
    results = [outcome.result for outcome in outcomes]
    baseline, rl, none, fails = _counts(results)
    untried = sum(result.baseline == NOT_TRIED for result in results)
    models = len({outcome.config.key for outcome in outcomes if outcome.config.model})
    return (f'Of {len(results)} configs ({models} distinct models) {baseline} run as they are, '
            f'{len(results) - baseline - untried} don\'t, and {untried} weren\'t tried. With replaced blocks {rl} of '
            f'the {baseline} run, {none} have no block that can be replaced, and {fails} fail.')


def _counts(results: Iterable[Result]) -> tuple[int, int, int, int]:
    results = list(results)
    rl = Counter(result.rl for result in results)
    return sum(result.baseline == RUNS for result in results), rl[RUNS], rl[NO_BLOCK], rl[FAILS]


def _table(title: str, outcomes: Sequence[Outcome], group: Callable[[Outcome], str]) -> str:
    lines = [f'| {title} | configs | baseline runs | RL runs | no replaceable block | RL fails | why not |',
             '|---|---|---|---|---|---|---|']
    for name in sorted({group(outcome) for outcome in outcomes}):
        results = [outcome.result for outcome in outcomes if group(outcome) == name]
        reasons = Counter(result.reason for result in results if result.baseline != RUNS or result.rl == FAILS)
        why = '; '.join(f'{count}: {_cell(reason)}' for reason, count in reasons.most_common())
        lines.append(f'| {name} | {len(results)} | ' + ' | '.join(map(str, _counts(results))) + f' | {why} |')
    return '\n'.join(lines)


def _by_reason(outcomes: Sequence[Outcome], chosen: Callable[[Result], bool]) -> str:
    """The chosen configs below their reasons, the commonest first."""
    names: dict[str, list[str]] = {}
    for outcome in outcomes:
        if chosen(outcome.result):
            names.setdefault(outcome.result.reason, []).append(f'`{outcome.config.name}`')
    groups = sorted(names.items(), key=lambda item: -len(item[1]))
    return '\n'.join(f'- {_cell(reason)} ({len(found)}): {", ".join(found)}' for reason, found in groups) or 'None.'


def _cell(text: str) -> str:
    """Text that a table's cell can hold."""
    return text.replace('|', '\\|')
