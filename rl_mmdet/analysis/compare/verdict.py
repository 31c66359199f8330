"""What to make of a comparison, in a sentence for each variant, and how its figures are judged."""
from collections.abc import Sequence

from scipy import stats

from .contents import Contents, VariantResult
from .differences import Spread

AP_VERDICTS = {'better': 'gains AP ({})', 'worse': 'loses AP ({})', 'open': 'may keep the baseline\'s AP or not ({})',
               None: 'has one seed, too few to judge its AP ({})'}
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
    said = [AP_VERDICTS[difference.verdict].format(signed(difference.mean))]
    base, cost = contents.baseline.cost, variant.cost
    if base is None or cost is None:
        return said[0]
    costs = {'peak memory of a training step': side_of_count(cost.peak_bytes, base.peak_bytes),
             'time of a training step': side(cost.step_ratios)}
    for word, found in (('spares', 'better'), ('costs more', 'worse')):
        names = [name for name in costs if costs[name] == found]
        said += [f'{word} {" and ".join(names)}'] if names else []
    if 'better' not in costs.values():
        said.append('spares neither memory nor time')
    return ', '.join(said)


def side_of_count(value: float, reference: float) -> str:
    """``'better'`` if a count is lower than the baseline's, ``'worse'`` if it is higher, else ``'same'``."""
    if abs(value - reference) <= SAME * reference:
        return 'same'
    return 'better' if value < reference else 'worse'


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
