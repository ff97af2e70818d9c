"""Means over data seeds and their 95 % confidence intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

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


def paired_interval(larger: Sequence[float], smaller: Sequence[float]) -> Interval:
    """The mean of `larger` - `smaller`, paired by data seed, and its interval by Student's t.

    Paired, because most of what varies from seed to seed, an easy or a hard draw of shots, is
    common to both.
    """
    return mean_interval([a - b for a, b in zip(larger, smaller, strict=True)])


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
