"""Whether a variant's AP differs from the baseline's: what the val images and the seeds leave open."""
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from .bootstrap import LEVEL


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds.

    Args:
        mean: arithmetic mean.
        deviation: standard deviation of single trainings (n - 1 in the denominator); None with one seed.
        values: one for each seed.
    """
    mean: float
    deviation: float | None
    values: list[float]


@dataclass(frozen=True)
class Difference:
    """A variant's AP minus the baseline's.

    Args:
        mean: of the seeds' means.
        images: interval by a paired bootstrap over the val images; None with one seed on a side.
        seeds: interval for what further seeds would give (Welch's t); None with one seed on a side.
        verdict: ``'better'`` or ``'worse'`` if both intervals are on that side of 0, else ``'open'``; None with one
            seed on a side.
    """
    mean: float
    images: tuple[float, float] | None = None
    seeds: tuple[float, float] | None = None
    verdict: str | None = None


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, list(values))


def difference(reference: Spread, other: Spread, images: tuple[float, float] | None = None) -> Difference:
    """Compare the AP of two detectors, each trained with several seeds.

    Args:
        reference, other: their AP.
        images: interval of their difference over the val images; None with one seed on a side.
    """
    mean = other.mean - reference.mean
    if images is None:
        return Difference(mean)
    seeds = welch_interval(reference.values, other.values)
    ends = *images, *seeds
    return Difference(mean, images, seeds, 'better' if min(ends) > 0 else 'worse' if max(ends) < 0 else 'open')


def welch_interval(reference: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval for the difference of two means, without the assumption of equal variances.

    Where neither side varies it is the difference itself.

    Args:
        reference, other: at least two values each.
    """
    with warnings.catch_warnings():  # scipy's, about values that are all the same
        warnings.filterwarnings('ignore', 'Precision loss', RuntimeWarning)
        interval = stats.ttest_ind(other, reference, equal_var=False).confidence_interval(LEVEL)
    return float(interval.low), float(interval.high)
