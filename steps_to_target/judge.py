"""From the rows of a log to a trajectory, a crossing and a status. Pure functions, no files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from steps_to_target.csvfile import Row, finite
from steps_to_target.model import Crossing, Ending, FloatArray, Status
from steps_to_target.targets import Target

_MAX_STEP = 2.0**53
# An evaluation later than this many usual gaps before the limit cannot have been the last one.
_GAP_SLACK = 1.0


class Point(NamedTuple):
    """One evaluation."""

    step: float
    seconds: float
    value: float
    test_value: float


@dataclass
class Trajectory:
    """What the evaluations of one run amount to.

    Attributes:
        points: surviving evaluations, steps strictly increasing.
        crossing: first evaluation, in the order of the log, that meets the validation target.
        test_crossing: the same for the test target.
        went_back: how often the log goes back in steps.
        repeated: evaluations logged again at the step of the one before.
        unusable: rows without a usable step.
        undone: whether a later resume rolled the crossing back.
    """

    points: list[Point]
    crossing: Crossing | None = None
    test_crossing: Crossing | None = None
    went_back: int = 0
    repeated: int = 0
    unusable: int = 0
    undone: bool = False

    def column(self, name: str) -> FloatArray:
        """One field of all points, shape ``(points,)``."""
        index = Point._fields.index(name)
        return np.array([point[index] for point in self.points], dtype=np.float64)


@dataclass(frozen=True)
class Budget:
    """What would end the run by itself: seconds and steps (None: not known)."""

    seconds: float | None = None
    steps: float | None = None


def _cross(point: Point, value: float, before: Point | None) -> Crossing:
    return Crossing(
        step=point.step,
        seconds=point.seconds,
        value=value,
        previous_step=before.step if before else None,
        previous_seconds=before.seconds if before and not math.isnan(before.seconds) else None,
    )


def follow(rows: Iterable[Row], target: Target | None) -> Trajectory:
    """Walk through the evaluations in the order of the log.

    After a preemption the log goes on at the checkpoint's step: evaluations from that step on were
    lost work and leave the trajectory. The crossing is the first evaluation in the log that meets
    the target, as AlgoPerf's scoring takes it, even where a resume undid it later (``undone``).
    """
    track = Trajectory(points=[])
    points = track.points
    crossed: Point | None = None
    column, test_column = (target.column, target.test_column) if target else ("", "")
    for row in rows:
        step = row.get("global_step")
        if step is None or not 0 <= step <= _MAX_STEP:
            track.unusable += 1
            continue
        seconds = finite(row, "accumulated_submission_time", "score")
        point = Point(
            step,
            math.nan if seconds is None or seconds < 0 else seconds,
            row.get(column, math.nan),
            row.get(test_column, math.nan),
        )
        if points and step <= points[-1].step:
            if step < points[-1].step:
                track.went_back += 1
            else:
                track.repeated += 1
            while points and points[-1].step >= step:
                points.pop()
        before = points[-1] if points else None
        points.append(point)
        if target is None:
            continue
        if track.crossing is None and target.met(point.value, target.validation):
            track.crossing = _cross(point, point.value, before)
            crossed = point
        if track.test_crossing is None and target.met(point.test_value, target.test):
            track.test_crossing = _cross(point, point.test_value, before)
    track.undone = crossed is not None and not any(
        point.step == crossed.step
        and target is not None
        and target.met(point.value, target.validation)
        for point in track.points
    )
    return track


def find_ending(rows: list[Row], known: bool) -> Ending:
    """Read the run's end off the rows of measurements.csv.

    AlgoPerf writes one row with ``score`` (the total submission time) and no metrics when the
    training loop ends, whatever ended it; a log without it stopped in between.
    """
    step = loss = None
    final = False
    seconds = None
    for row in rows:
        row_step = finite(row, "global_step")
        if row_step is not None:
            step = row_step
        if "loss" in row:
            loss = row["loss"]
        total = finite(row, "score")
        final = (
            total is not None
            and "accumulated_submission_time" not in row
            and "total_duration" not in row
            and not any(name.startswith("validation/") for name in row)
        )
        time = total if final else finite(row, "accumulated_submission_time", "score")
        seconds = time if time is not None else seconds
    return Ending(final, step, seconds, loss, known)


def _count(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


def _clock(value: float | None) -> str:
    return "unknown time" if value is None or math.isnan(value) else f"{value:,.1f} s"


def _reached(track: Trajectory, target: Target, ending: Ending) -> str:
    crossing = track.crossing
    assert crossing is not None
    text = (
        f"{target.column} {crossing.value:.6g} {target.sign} {target.validation:.6g} at step "
        f"{crossing.step:,.0f}, {_clock(crossing.seconds)}; "
    )
    if crossing.previous_step is None:
        text += "no evaluation before it"
    else:
        text += (
            f"not yet at the evaluation before it (step {crossing.previous_step:,.0f}, "
            f"{_clock(crossing.previous_seconds)})"
        )
    if track.undone:
        text += "; a later resume went back behind it"
    if ending.known and not ending.final_row:
        text += f"; the log then stops without a final row (last step {_count(ending.step)})"
    return text


def _unreached_value(track: Trajectory, target: Target) -> str:
    values = track.column("value")
    usable = values[~np.isnan(values)]
    if not usable.size:
        return f"{target.column} is NaN or missing in all {len(values)} evaluations"
    best = float(usable.min() if target.lower_is_better else usable.max())
    text = f"best {target.column} {best:.6g}, target {target.validation:.6g}"
    if np.isnan(values[-1]):
        first = int(np.flatnonzero(~np.isnan(values))[-1]) + 1
        text += f"; NaN from step {track.points[first].step:,.0f} on"
    return text


def judge(
    track: Trajectory, target: Target | None, ending: Ending, budget: Budget, problem: str
) -> tuple[Status, str]:
    """Status of a run and the evidence for it.

    Args:
        track: its evaluations.
        target: what it had to reach (None: not known).
        ending: how its log ends.
        budget: its time limit and step budget.
        problem: why the evaluations cannot be read at all (empty: they can).

    Returns:
        The status and one line that says what in the log it rests on.
    """
    if target is not None and track.crossing is not None:
        return Status.REACHED, _reached(track, target, ending)
    if not track.points:
        return _without_evaluations(ending, problem)
    if target is None:
        return (
            Status.UNREADABLE,
            "neither the run's meta data nor AlgoPerf's workloads give a target; "
            "name one with --target WORKLOAD:METRIC=VALUE",
        )
    if not any(not math.isnan(point.value) for point in track.points) and problem:
        return Status.UNREADABLE, problem
    best = _unreached_value(track, target)
    last = track.points[-1]
    step = max(last.step, ending.step if ending.step is not None else 0.0)
    seconds = ending.seconds if ending.seconds is not None else last.seconds
    where = f"last evaluation at step {last.step:,.0f}, {_clock(last.seconds)}"
    if ending.final_row or not ending.known:
        if budget.steps is not None and step >= budget.steps:
            return Status.MISSED, f"{best}; step budget of {budget.steps:,.0f} used up"
        if budget.seconds is not None and seconds >= budget.seconds:
            return (
                Status.OUT_OF_TIME,
                f"{best}; ended at {_clock(seconds)} (step {step:,.0f}), "
                f"limit {budget.seconds:,.0f} s",
            )
    if ending.final_row:
        return (
            Status.MISSED,
            f"{best}; the run ended by itself at step {step:,.0f}, {_clock(seconds)}",
        )
    if not ending.known:
        gap = last.seconds - track.points[-2].seconds if len(track.points) > 1 else math.nan
        if budget.seconds is not None and last.seconds + _GAP_SLACK * gap >= budget.seconds:
            return (
                Status.OUT_OF_TIME,
                f"{best}; {where}: the next would have come after the limit of "
                f"{budget.seconds:,.0f} s (no measurements.csv to confirm it)",
            )
    end = f"no final row; {where}"
    if ending.step is not None and ending.step > last.step:
        end += f", last logged step {ending.step:,.0f}"
    if budget.seconds is not None and not math.isnan(last.seconds):
        end += f" ({last.seconds / budget.seconds:.0%} of the limit of {budget.seconds:,.0f} s)"
    if ending.loss is not None and not math.isfinite(ending.loss):
        return Status.CRASHED, f"{best}; training loss {ending.loss} when the log stops; {end}"
    if len(track.points) == 1:
        return Status.CRASHED, f"the log stops after its first evaluation; {best}; {end}"
    return Status.CUT_SHORT, f"{best}; {end}"


def _without_evaluations(ending: Ending, problem: str) -> tuple[Status, str]:
    if problem and "cannot be read" in problem:
        return Status.UNREADABLE, problem
    if ending.final_row:
        return (
            Status.UNREADABLE,
            f"the run ended by itself at step {_count(ending.step)}, but its log has no evaluation"
            + (f" ({problem})" if problem else ""),
        )
    text = "the log has no evaluation"
    if ending.step is not None:
        text += f" and stops at step {ending.step:,.0f}"
    return Status.CRASHED, text + (f" ({problem})" if problem else "")


def counts_outer_steps(
    track: Trajectory, target: Target | None, budget_seconds: float | None, step_hint: float | None
) -> str:
    """Why ``global_step`` seems to count more than optimizer steps (empty: it does not).

    Some submissions make many updates in one call of ``update_params``. Two signs must agree: at
    the run's pace less than a twentieth of the workload's step hint would fit into its time limit,
    and the metric went at least halfway to its target within a hundredth of that hint.
    """
    if target is None or not budget_seconds or not step_hint or len(track.points) < 3:
        return ""
    first, last = track.points[0], track.points[-1]
    if last.step <= first.step or not last.seconds > first.seconds:
        return ""
    pace = (last.seconds - first.seconds) / (last.step - first.step)
    fitting = budget_seconds / pace
    way = target.validation - first.value
    if fitting >= step_hint / 20 or not math.isfinite(way) or way == 0:
        return ""
    halfway = [p for p in track.points if (p.value - first.value) / way >= 0.5]
    if not halfway or halfway[0].step > step_hint / 100:
        return ""
    return (
        f"global_step seems to count outer steps only: {pace:,.1f} s per step, so only "
        f"{fitting:,.0f} of the workload's {step_hint:,.0f} steps would fit into its time limit, "
        f"yet the metric went halfway to the target by step {halfway[0].step:,.0f}; its steps are "
        "not compared"
    )
