"""Means, medians and bootstrap ratios of steps and seconds to target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


def describe(values: Sequence[float]) -> Stat:
    """Summarise values of all repetitions; infinity or NaN marks one that missed."""
    array = np.asarray(values, dtype=np.float64)
    hit = array[np.isfinite(array)]
    mean = float(hit.mean()) if hit.size else math.nan
    stderr = float(hit.std(ddof=1) / math.sqrt(hit.size)) if hit.size > 1 else math.nan
    return Stat(hit.size, mean, stderr, median_with_misses(values), array.size)


def median_with_misses(values: Sequence[float]) -> float:
    """Median with every miss as infinity (NaN for no values at all)."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return math.nan
    ordered = np.sort(np.where(np.isfinite(array), array, np.inf))
    middle = array.size // 2
    if array.size % 2:
        return float(ordered[middle])
    return float((ordered[middle - 1] + ordered[middle]) / 2)


def _resampled_means(values: FloatArray, generator: np.random.Generator) -> FloatArray:
    draws = generator.integers(0, values.size, size=(RESAMPLES, values.size))
    means: FloatArray = values[draws].mean(axis=1)
    return means


def ratio_of_means(values: Sequence[float], reference: Sequence[float]) -> Ratio | None:
    """Mean of ``values`` over mean of ``reference`` with a percentile bootstrap interval.

    Repetitions that missed (infinite or NaN) are left out, so where some missed the ratio flatters
    the method that missed: read it together with the fraction reached. Both sides are resampled
    independently, ``RESAMPLES`` times, with a fixed seed.

    Returns:
        None when either side has no repetition that reached, or the reference's mean is not
        positive. The interval is None unless both sides have at least two.
    """
    top = np.asarray(values, dtype=np.float64)
    bottom = np.asarray(reference, dtype=np.float64)
    top, bottom = top[np.isfinite(top)], bottom[np.isfinite(bottom)]
    if not top.size or not bottom.size or not bottom.mean() > 0:
        return None
    value = float(top.mean() / bottom.mean())
    if top.size < 2 or bottom.size < 2:
        return Ratio(value, None, None)
    generator = np.random.default_rng(0)
    tops, bottoms = _resampled_means(top, generator), _resampled_means(bottom, generator)
    usable = bottoms > 0
    ratios = tops[usable] / bottoms[usable]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Ratio(value, float(low), float(high))
