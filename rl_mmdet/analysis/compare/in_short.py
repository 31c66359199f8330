"""The report in a sentence for each variant: what is better, what is worse, what the data can't tell."""
from collections.abc import Iterator, Sequence
from statistics import median

from scipy import stats

from .contents import Contents, VariantResult
from .costs import Cost
from .differences import Difference

COUNTS = {'trainable': 'trainable parameters', 'step_flops': 'FLOPs of a training step',
          'saved_bytes': 'bytes saved for backward', 'peak_bytes': 'peak memory of a training step'}
TIMES = {'step_ratios': 'time of a training step', 'latency_ratios': 'latency'}
SAME = 0.005
"""Counts that differ by less than this part are called the same."""


def in_short(contents: Contents) -> list[str]:
    """One sentence for each variant, the most important first: does it pay?"""
    return [_sentence(contents, variant) for variant in contents.variants[1:]]


def _sentence(contents: Contents, variant: VariantResult) -> str:
    findings: dict[str, list[str]] = {'better': [], 'worse': [], 'open': [], 'same': []}
    for verdict, text in [*_precision(contents, variant), *_costs(contents.baseline.cost, variant.cost)]:
        findings[verdict].append(text)
    words = {'better': 'better in', 'worse': 'worse in', 'open': 'the data can\'t tell about', 'same': 'the same'}
    parts = [f'{words[verdict]} {", ".join(texts)}' for verdict, texts in findings.items() if texts]
    if variant.cost_error:
        parts.append(f'its cost couldn\'t be measured ({variant.cost_error})')
    return f'{variant.name}: {"; ".join(parts) or "nothing known yet"}.'


def _precision(contents: Contents, variant: VariantResult) -> Iterator[tuple[str, str]]:
    for metric, difference in variant.difference.items():
        name = 'AP' if contents.metrics == ['bbox'] else {'bbox': 'box AP', 'segm': 'mask AP'}[metric]
        yield difference.verdict or 'open', f'{name} ({describe(difference)})'


def describe(difference: Difference) -> str:
    """A difference of AP and how sure it is."""
    if difference.verdict is None:
        return f'{signed(difference.mean)}, but one seed only: no interval'
    low, high = difference.widest
    return f'{signed(difference.mean)}, between {signed(low)} and {signed(high)}'


def _costs(baseline: Cost | None, cost: Cost | None) -> Iterator[tuple[str, str]]:
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


def side(ratios: Sequence[float], level: float = 0.05) -> str:
    """``'better'`` if ratios are below 1, ``'worse'`` if they are above, by a two-sided sign test, else ``'open'``.

    With 7 rounds all of them must agree; with fewer than 6 it is open.

    Args:
        ratios: one for each round.
        level: how often, at most, rounds of the same speed may seem to differ.
    """
    lower, higher = (sum(each < 1 for each in ratios), sum(each > 1 for each in ratios))
    if lower == higher or stats.binomtest(lower, lower + higher).pvalue >= level:
        return 'open'
    return 'better' if lower > higher else 'worse'


def signed(value: float) -> str:
    """A difference of AP, as +0.012."""
    return f'{round(value, 3) + 0.:+.3f}'
