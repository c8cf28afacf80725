"""Means, medians and bootstrap ratios of steps and seconds to target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from steps_to_target.model import FloatArray

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Stat:
    """Summary of one quantity over repetitions.

    Attributes:
        n: repetitions that reached the target (mean and standard error are over these).
        mean: their mean (NaN for n = 0).
        stderr: standard deviation (n - 1) over the root of n (NaN for n < 2).
        median: over all repetitions, a miss counting as infinity, as AlgoPerf takes it.
        total: repetitions, reached or not.
    """

    n: int
    mean: float
    stderr: float
    median: float
    total: int


@dataclass(frozen=True)
class Ratio:
    """Ratio of two means with a bootstrap interval (None where it cannot be had)."""

    value: float
    low: float | None
    high: float | None


def _hits(values: Sequence[float]) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


def describe(values: Sequence[float]) -> Stat:
    """Summarise values of all repetitions; infinity or NaN marks one that missed."""
    hit = _hits(values)
    mean = float(hit.mean()) if hit.size else math.nan
    stderr = float(stats.sem(hit)) if hit.size > 1 else math.nan
    return Stat(hit.size, mean, stderr, median_with_misses(values), len(values))


def median_with_misses(values: Sequence[float]) -> float:
    """Median with every miss as infinity (NaN for no values at all)."""
    array = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=np.inf, posinf=np.inf)
    return float(np.median(array)) if array.size else math.nan


def _ratio(top: FloatArray, bottom: FloatArray, axis: int) -> FloatArray:
    quotient: FloatArray = top.mean(axis=axis) / bottom.mean(axis=axis)
    return quotient


def ratio_of_means(values: Sequence[float], reference: Sequence[float]) -> Ratio | None:
    """Mean of ``values`` over mean of ``reference`` with a percentile bootstrap interval.

    Repetitions that missed (infinite or NaN) are left out, so where some missed the ratio flatters
    the method that missed: read it together with the fraction reached. Both sides are resampled
    independently, ``RESAMPLES`` times, with a fixed seed.

    Returns:
        None when either side has no repetition that reached, or the reference has one that is not
        positive. The interval is None unless both sides have at least two.
    """
    top, bottom = _hits(values), _hits(reference)
    if not top.size or not bottom.size or bottom.min() <= 0:
        return None
    value = float(top.mean() / bottom.mean())
    if top.size < 2 or bottom.size < 2:
        return Ratio(value, None, None)
    interval = stats.bootstrap(
        (top, bottom),
        _ratio,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Ratio(value, float(interval.low), float(interval.high))
