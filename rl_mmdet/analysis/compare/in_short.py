"""The report in a sentence for each variant: what is better, what is worse, what the data can't tell."""
from collections.abc import Iterator, Sequence
from statistics import median

from scipy import stats

from .contents import Contents, VariantResult
from .costs import Cost

COUNTS = {'trainable': 'trainable parameters', 'step_flops': 'FLOPs of a training step',
          'saved_bytes': 'bytes saved for backward', 'peak_bytes': 'peak memory of a training step'}
TIMES = {'step_ratios': 'time of a training step', 'latency_ratios': 'latency'}
VERDICTS = {'better': 'better in', 'worse': 'worse in', 'open': 'the data can\'t tell about', 'same': 'the same'}
SAME = 0.005
"""Counts that differ by a smaller fraction are called the same."""


def in_short(contents: Contents) -> list[str]:
    """One sentence for each variant, the most important first: does it pay?"""
    return [_sentence(contents, variant) for variant in contents.variants[1:]]


def _sentence(contents: Contents, variant: VariantResult) -> str:
    findings: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for verdict, text in [*_precision(contents, variant), *_costs(contents.baseline.cost, variant.cost)]:
        findings[verdict].append(text)
    said = [f'{VERDICTS[verdict]} {", ".join(texts)}' for verdict, texts in findings.items() if texts]
    if variant.cost_error:
        said.append(f'its cost couldn\'t be measured ({variant.cost_error})')
    return f'{variant.name}: {"; ".join(said) or "nothing known yet"}.'


def _precision(contents: Contents, variant: VariantResult) -> Iterator[tuple[str, str]]:
    """For each metric the verdict on its AP, and how sure it is."""
    for metric, difference in variant.difference.items():
        name = 'AP' if contents.metrics == ['bbox'] else {'bbox': 'box AP', 'segm': 'mask AP'}[metric]
        sure = ', but one seed only: no interval'
        if difference.verdict is not None:
            sure = ', between {} and {}'.format(*map(signed, difference.widest))
        yield difference.verdict or 'open', f'{name} ({signed(difference.mean)}{sure})'


def _costs(baseline: Cost | None, cost: Cost | None) -> Iterator[tuple[str, str]]:
    """For each kind of cost the verdict, and by how much."""
    if baseline is None or cost is None:
        return
    for key, name in COUNTS.items():
        change = ratio(getattr(cost, key), getattr(baseline, key)) - 1
        yield ('same', name) if abs(change) < SAME else ('better' if change < 0 else 'worse', f'{name} ({change:+.0%})')
    for key, name in TIMES.items():
        ratios = getattr(cost, key)
        yield side(ratios), f'{name} (×{median(ratios):.2f}, rounds {min(ratios):.2f} to {max(ratios):.2f})'


def ratio(value: float, reference: float) -> float:
    """``value`` over ``reference``, 1 if both are 0."""
    return value / reference if reference else 1. if not value else float('inf')


def side(ratios: Sequence[float]) -> str:
    """``'better'`` if ratios are below 1, ``'worse'`` if they are above, by a two-sided sign test, else ``'open'``.

    Rounds of the same speed seem to differ in 5 % of all tests at most: with 7 rounds all of them must agree, and with
    fewer than 6 it is open.
    """
    lower, higher = (sum(each < 1 for each in ratios), sum(each > 1 for each in ratios))
    if lower == higher or stats.binomtest(lower, lower + higher).pvalue >= 0.05:
        return 'open'
    return 'better' if lower > higher else 'worse'


def signed(value: float) -> str:
    """A difference of AP, as +0.012."""
    return f'{round(value, 3) + 0.:+.3f}'
