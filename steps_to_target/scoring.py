"""Performance profile and benchmark score as AlgoPerf defines them, over any named workloads.

A method's time on a workload is the median over studies of each study's fastest trial. Its ratio
is that time over the best time of all compared methods. The profile at tau is the fraction of
workloads with a ratio of at most tau; the score is the profile's mean over tau from 1 to 4
(100 points, trapezoidal rule, as AlgoPerf's scoring code). AlgoPerf's own scoring divides by all
its workloads whatever was run; here the denominator is the number of workloads named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from steps_to_target.errors import CompareError
from steps_to_target.model import FloatArray
from steps_to_target.summary import Group, Summary

Measure = Literal["seconds", "steps"]
MAX_TAU = 4.0
_POINTS = 100


@dataclass(frozen=True)
class Profile:
    """Performance profile.

    Attributes:
        measure: what the ratios are of.
        workloads: the named subset; a workload with several targets counts once for each.
        taus: shape ``(points,)``.
        curves: fraction of workloads within tau, by method, each of shape ``(points,)``.
        scores: AlgoPerf benchmark score by method, in [0, 1].
        ratios: by method, then workload; infinity where the target was not reached.
        absent: ``"method: workload"`` where a method has no run (counted as not reached).
    """

    measure: Measure
    workloads: tuple[str, ...]
    taus: FloatArray
    curves: dict[str, FloatArray]
    scores: dict[str, float]
    ratios: dict[str, dict[str, float]]
    absent: tuple[str, ...]


def _value(group: Group, measure: Measure) -> float:
    value = group.algoperf_seconds if measure == "seconds" else group.algoperf_steps
    return value if math.isfinite(value) and value > 0 else math.inf


def performance_profile(
    summary: Summary, workloads: Sequence[str] | None = None, *, measure: Measure = "seconds"
) -> Profile:
    """Profile and score of all methods (published rows take no part).

    Args:
        summary: from ``summarize``.
        workloads: the subset; None for all workloads that have runs.
        measure: ``"seconds"`` (AlgoPerf's) or ``"steps"``.

    Raises:
        CompareError: a named workload has no run.
    """
    known = summary.workloads
    named = list(dict.fromkeys(workloads)) if workloads is not None else known
    unknown = [name for name in named if name not in known]
    chosen = tuple(group.table for group in summary.groups if group.workload in named)
    chosen = tuple(dict.fromkeys(chosen))
    if unknown or not chosen:
        raise CompareError(
            f"no run on workload {', '.join(unknown) or '(none named)'}; "
            f"these have runs: {', '.join(known)}"
        )
    groups = {(g.table, g.method): g for g in summary.groups if not g.published}
    methods = sorted({method for workload, method in groups if workload in chosen})
    ratios: dict[str, dict[str, float]] = {method: {} for method in methods}
    absent = []
    for workload in chosen:
        values = {}
        for method in methods:
            group = groups.get((workload, method))
            values[method] = _value(group, measure) if group else math.inf
            if group is None:
                absent.append(f"{method}: {workload}")
        best = min(values.values())
        for method, value in values.items():
            ratios[method][workload] = value / best if math.isfinite(value) else math.inf
    taus = np.linspace(1.0, MAX_TAU, _POINTS)
    curves: dict[str, FloatArray] = {}
    scores: dict[str, float] = {}
    for method in methods:
        own = np.array([ratios[method][workload] for workload in chosen])
        curve = (own[None, :] <= taus[:, None]).mean(axis=1)
        curves[method] = curve
        scores[method] = float(np.trapezoid(curve, taus) / (MAX_TAU - 1.0))
    return Profile(measure, chosen, taus, curves, scores, ratios, tuple(absent))
