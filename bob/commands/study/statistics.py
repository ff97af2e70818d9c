"""Means over data seeds, their 95 % confidence intervals, and what tests say of them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval; NaN where one value gives none."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of `values` and its interval by Student's t, with n - 1 degrees of freedom."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    if np.ptp(values) == 0:  # scipy warns of it and answers NaN
        return Interval(mean, mean, mean)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    return Interval(mean, float(low), float(high))


def paired(larger: Sequence[float], smaller: Sequence[float]) -> list[float]:
    """The differences `larger` - `smaller` of each data seed."""
    return [a - b for a, b in zip(larger, smaller, strict=True)]


def paired_interval(larger: Sequence[float], smaller: Sequence[float]) -> Interval:
    """The mean of `larger` - `smaller`, paired by data seed, and its interval by Student's t.

    Paired, because most of what varies from seed to seed, an easy or a hard draw of shots, is
    common to both.
    """
    return mean_interval(paired(larger, smaller))


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """The ratio of the means of paired values, and its interval by Fieller's theorem.

    The ratios r for which the paired differences `numerator` - r * `denominator` are not
    significantly off zero: |mean| <= t * standard error, a quadratic inequality in r. Where the
    denominator itself is not significantly off zero, no interval is bounded: NaN.
    """
    a, b = np.asarray(numerator, float), np.asarray(denominator, float)
    ratio = float(a.mean() / b.mean()) if b.mean() else math.nan
    if len(a) < 2:
        return Interval(ratio, math.nan, math.nan)
    covariance = np.cov(a, b) * stats.t.ppf((1 + CONFIDENCE) / 2, len(a) - 1) ** 2 / len(a)
    square = b.mean() ** 2 - covariance[1, 1]
    linear = a.mean() * b.mean() - covariance[0, 1]
    constant = a.mean() ** 2 - covariance[0, 0]
    if square <= 0:
        return Interval(ratio, math.nan, math.nan)
    spread = math.sqrt(max(0.0, linear**2 - square * constant))
    return Interval(ratio, (linear - spread) / square, (linear + spread) / square)


def p_value(differences: Sequence[float]) -> float:
    """Of Student's t test, two-sided, that the mean of the paired `differences` is zero; or NaN."""
    if len(differences) < 2:
        return math.nan
    if np.ptp(differences) == 0:
        return 0.0 if differences[0] else 1.0
    return float(stats.ttest_1samp(differences, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, in their order, corrected for their number by Holm's method (1979).

    The k-th smallest of m is multiplied by m - k + 1, and none becomes less than one before it, or
    more than 1: those below 5 % are a family of tests that errs in one or more of them with a
    probability of 5 % at most. NaN, which no test gave, stays and does not count.
    """
    corrected = [math.nan] * len(p_values)
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[place] = highest
    return corrected


def smallest_visible(differences: Sequence[float], power: float = 0.8) -> float:
    """The true difference that a test of as many paired `differences` sees with this power.

    By Student's t test, two-sided, at 5 %, if their spread is what it is in these; NaN where there
    is none. It says what could have been seen, not what was.
    """
    count = len(differences)
    if count < 2:
        return math.nan
    bound = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)

    def missed(noncentrality: float) -> float:
        return float(power - stats.nct.sf(bound, count - 1, noncentrality))

    error = float(np.std(differences, ddof=1)) / math.sqrt(count)
    return float(optimize.brentq(missed, 0, 10 * bound)) * error
