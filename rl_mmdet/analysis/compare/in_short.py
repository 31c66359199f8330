"""The report in short: a verdict, and for each variant what is better, what is worse, what the data can't tell."""
from collections.abc import Iterator, Sequence
from statistics import median

from scipy import stats

from .contents import Contents, VariantResult
from .costs import Cost
from .differences import Spread

COUNTS = {'trainable': 'trainable parameters', 'step_flops': 'FLOPs of a training step',
          'saved_bytes': 'bytes saved for backward', 'peak_bytes': 'peak memory of a training step'}
TIMES = {'step_ratios': 'time of a training step', 'latency_ratios': 'latency'}
VERDICTS = {'better': 'better in', 'worse': 'worse in', 'open': 'the data can\'t tell about', 'same': 'the same'}
AP_VERDICTS = {'better': 'gains AP ({})', 'worse': 'loses AP ({})', 'open': 'may keep the baseline\'s AP or not ({})',
               None: 'has one seed, too few to judge its AP ({})'}
SPARED = (COUNTS['peak_bytes'], TIMES['step_ratios'])
"""What training a variant should spare: memory and time."""
LEARNED = 0.02
"""A detector with less AP has learned nothing."""
SAME = 0.005
"""Counts that differ by a smaller fraction are called the same."""


def verdict(contents: Contents) -> str:
    """What to make of it all, in a sentence: for each variant, or why there is nothing to be said."""
    metric = contents.metrics[0]
    aps = {variant.name: variant.scores.get(metric, {}).get('ap') for variant in contents.variants}
    base = aps.pop(contents.baseline.name)
    if base is None:
        return 'Nothing is known of AP yet: the baseline has no finished training.'
    if base.mean < LEARNED:
        return (f'Nothing was learned: AP {base.mean:.3f} of the baseline, so what variants lose or keep says nothing. '
                'Train longer, from pretrained weights, or with another learning rate.')
    return ' '.join(f'{variant.name} {_verdict(contents, variant, aps[variant.name])}.'
                    for variant in contents.variants[1:])


def _verdict(contents: Contents, variant: VariantResult, ap: Spread | None) -> str:
    """Whether a variant pays: what happens to AP, and whether it spares time or memory for that."""
    if ap is None:
        return 'isn\'t trained yet'
    if ap.mean < LEARNED:
        return f'has learned nothing (AP {ap.mean:.3f})'
    difference = variant.difference[contents.metrics[0]]
    costs = {name: found for found, name, _ in _costs(contents.baseline.cost, variant.cost) if name in SPARED}
    said = [AP_VERDICTS[difference.verdict].format(signed(difference.mean))]
    for word, found in (('spares', 'better'), ('costs more', 'worse')):
        names = [name for name in costs if costs[name] == found]
        said += [f'{word} {" and ".join(names)}'] if names else []
    if costs and 'better' not in costs.values():
        said.append('spares neither memory nor time')
    return ', '.join(said)


def in_short(contents: Contents) -> list[tuple[str, str]]:
    """Each variant's name, and what is better, what is worse, and what the data can't tell, in a sentence."""
    return [(variant.name, _sentence(contents, variant)) for variant in contents.variants[1:]]


def _sentence(contents: Contents, variant: VariantResult) -> str:
    findings: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for verdict, text in _precision(contents, variant):
        findings[verdict].append(text)
    for verdict, name, amount in _costs(contents.baseline.cost, variant.cost):
        findings[verdict].append(name + amount)
    said = [f'{VERDICTS[verdict]} {", ".join(texts)}' for verdict, texts in findings.items() if texts]
    if variant.cost_error:
        said.append(f'its cost couldn\'t be measured ({variant.cost_error})')
    return f'{"; ".join(said) or "nothing known yet"}.'


def _precision(contents: Contents, variant: VariantResult) -> Iterator[tuple[str, str]]:
    """For each metric the verdict on its AP, and how sure it is."""
    for metric, difference in variant.difference.items():
        name = 'AP' if contents.metrics == ['bbox'] else {'bbox': 'box AP', 'segm': 'mask AP'}[metric]
        sure = ', but one seed only: no interval'
        if difference.verdict is not None:
            sure = ', between {} and {}'.format(*map(signed, difference.widest))
        yield difference.verdict or 'open', f'{name} ({signed(difference.mean)}{sure})'


def _costs(baseline: Cost | None, cost: Cost | None) -> Iterator[tuple[str, str, str]]:
    """For each kind of cost the verdict, its name, and by how much."""
    if baseline is None or cost is None:
        return
    for key, name in COUNTS.items():
        change = ratio(getattr(cost, key), getattr(baseline, key)) - 1
        yield ('same', name, '') if abs(change) < SAME else ('better' if change < 0 else 'worse', name,
                                                             f' ({change:+.0%})')
    for key, name in TIMES.items():
        ratios = getattr(cost, key)
        yield side(ratios), name, f' (×{median(ratios):.2f}, rounds {min(ratios):.2f} to {max(ratios):.2f})'


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
