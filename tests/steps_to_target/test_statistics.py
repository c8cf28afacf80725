"""Means, medians and bootstrap intervals against numbers worked out by hand."""

import itertools
import math

import numpy as np
import pytest

from steps_to_target.statistics import describe, median_with_misses, ratio_of_means


def test_mean_and_standard_error():
    stat = describe([10.0, 12.0, 17.0])
    assert (stat.n, stat.total, stat.mean, stat.median) == (3, 3, 13.0, 12.0)
    # Deviations -3, -1, 4: variance 26/2, standard error sqrt(13/3).
    assert stat.stderr == pytest.approx(math.sqrt(13 / 3))


def test_misses_count_in_the_median_only():
    stat = describe([10.0, math.inf, 20.0, math.nan])
    assert (stat.n, stat.total, stat.mean) == (2, 4, 15.0)
    assert stat.median == math.inf
    assert describe([10.0, 20.0, math.inf]).median == 20.0
    assert median_with_misses([1.0, 3.0]) == 2.0


def test_no_values():
    stat = describe([])
    assert (stat.n, stat.total) == (0, 0)
    assert math.isnan(stat.mean)
    assert math.isnan(stat.median)
    assert math.isnan(describe([5.0]).stderr)


def test_ratio_needs_both_sides():
    assert ratio_of_means([], [1.0]) is None
    assert ratio_of_means([1.0], [math.inf]) is None
    assert ratio_of_means([1.0], [0.0]) is None
    ratio = ratio_of_means([5.0], [10.0, 10.0])
    assert (ratio.value, ratio.low, ratio.high) == (0.5, None, None)


def test_interval_is_that_of_all_resamples():
    top, bottom = [8.0, 9.0, 7.0], [16.0, 17.0, 18.0]
    ratio = ratio_of_means(top, bottom)
    means = [
        [float(np.mean(draw)) for draw in itertools.product(values, repeat=3)]
        for values in (top, bottom)
    ]
    every = [a / b for a in means[0] for b in means[1]]
    low, high = np.percentile(every, [2.5, 97.5])
    assert ratio.value == pytest.approx(8 / 17)
    assert ratio.low == pytest.approx(low, abs=0.004)
    assert ratio.high == pytest.approx(high, abs=0.004)
    assert ratio == ratio_of_means(top, bottom)


def test_equal_repetitions_give_a_point_and_misses_are_left_out():
    ratio = ratio_of_means([5.0, 5.0, math.inf], [10.0, 10.0])
    assert (ratio.value, ratio.low, ratio.high) == (0.5, 0.5, 0.5)
