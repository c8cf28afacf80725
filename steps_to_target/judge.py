"""From the evaluations of a log to a trajectory, a crossing and a status. No files are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from steps_to_target.model import Crossing, Ending, Status
from steps_to_target.targets import Target

_MAX_STEP = 2.0**53
# An evaluation later than this many usual gaps before the limit cannot have been the last one.
_GAP_SLACK = 1.0
POINT = ("step", "seconds", "value", "test_value")


@dataclass
class Trajectory:
    """What the evaluations of one run amount to.

    Attributes:
        points: surviving evaluations, columns ``POINT``, steps strictly increasing.
        crossing: first evaluation, in the order of the log, that meets the validation target.
        test_crossing: the same for the test target.
        went_back: how often the log goes back in steps.
        repeated: evaluations logged again at the step of the one before.
        unusable: rows without a usable step.
        undone: whether a later resume rolled the crossing back.
    """

    points: pd.DataFrame
    crossing: Crossing | None = None
    test_crossing: Crossing | None = None
    went_back: int = 0
    repeated: int = 0
    unusable: int = 0
    undone: bool = False


@dataclass(frozen=True)
class Budget:
    """What would end the run by itself: seconds and steps (None: not known)."""

    seconds: float | None = None
    steps: float | None = None


def _surviving(points: pd.DataFrame) -> pd.DataFrame:
    """Evaluations that no later one goes back to or behind."""
    steps = points["step"].to_numpy()
    later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.inf)
    return points[steps < later]


def _cross(points: pd.DataFrame, name: str, met: pd.Series) -> Crossing | None:
    if not met.any():
        return None
    position = int(met.to_numpy().argmax())
    point = points.iloc[position]
    before = _surviving(points.iloc[: position + 1]).iloc[:-1].tail(1)
    seconds = before["seconds"].dropna()
    return Crossing(
        step=float(point["step"]),
        seconds=float(point["seconds"]),
        value=float(point[name]),
        previous_step=float(before["step"].iloc[0]) if len(before) else None,
        previous_seconds=float(seconds.iloc[0]) if len(seconds) else None,
    )


def follow(evaluations: pd.DataFrame, target: Target | None) -> Trajectory:
    """Walk through the evaluations in the order of the log.

    After a preemption the log goes on at the checkpoint's step: evaluations from that step on were
    lost work and leave the trajectory. The crossing is the first evaluation in the log that meets
    the target, as AlgoPerf's scoring takes it, even where a resume undid it later (``undone``).

    Args:
        evaluations: columns ``POINT``, one row for each evaluation.
        target: what has to be met.
    """
    usable = evaluations["step"].between(0, _MAX_STEP)
    points = evaluations[usable].reset_index(drop=True)
    points["seconds"] = points["seconds"].where(points["seconds"] >= 0)
    change = points["step"].diff()
    track = Trajectory(
        points=_surviving(points),
        went_back=int((change < 0).sum()),
        repeated=int((change == 0).sum()),
        unusable=int((~usable).sum()),
    )
    if target is None:
        return track
    track.crossing = _cross(points, "value", target.met(points["value"], target.validation))
    track.test_crossing = _cross(
        points, "test_value", target.met(points["test_value"], target.test)
    )
    if track.crossing is not None:
        kept = track.points[track.points["step"] == track.crossing.step]
        track.undone = not bool(target.met(kept["value"], target.validation).any())
    return track


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
    values = track.points["value"]
    if values.isna().all():
        return f"{target.column} is NaN or missing in all {len(values)} evaluations"
    best = float(values.min() if target.lower_is_better else values.max())
    text = f"best {target.column} {best:.6g}, target {target.validation:.6g}"
    if np.isnan(values.iloc[-1]):
        first = track.points["step"][values.last_valid_index() + 1 :].iloc[0]
        text += f"; NaN from step {first:,.0f} on"
    return text


def judge(
    track: Trajectory,
    target: Target | None,
    ending: Ending,
    budget: Budget,
    problem: str = "",
    *,
    unreadable: bool = False,
) -> tuple[Status, str]:
    """Status of a run and the evidence for it.

    Args:
        track: its evaluations.
        target: what it had to reach (None: not known).
        ending: how its log ends.
        budget: its time limit and step budget.
        problem: why the evaluations cannot be read at all (empty: they can).
        unreadable: the problem is the files' form, not that they are missing or empty.

    Returns:
        The status and one line that says what in the log it rests on.
    """
    if target is not None and track.crossing is not None:
        return Status.REACHED, _reached(track, target, ending)
    if track.points.empty:
        return _without_evaluations(ending, problem, unreadable)
    if target is None:
        return (
            Status.UNREADABLE,
            problem
            or "neither the run's meta data nor AlgoPerf's workloads give a target; "
            "name one with --target WORKLOAD:METRIC=VALUE",
        )
    if problem and track.points["value"].isna().all():
        return Status.UNREADABLE, problem
    best = _unreached_value(track, target)
    last = track.points.iloc[-1]
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
        gap = track.points["seconds"].diff().iloc[-1]
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


def _without_evaluations(ending: Ending, problem: str, unreadable: bool) -> tuple[Status, str]:
    if unreadable:
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
    first, last = track.points.iloc[0], track.points.iloc[-1]
    if last.step <= first.step or not last.seconds > first.seconds:
        return ""
    pace = (last.seconds - first.seconds) / (last.step - first.step)
    fitting = budget_seconds / pace
    way = target.validation - first.value
    if fitting >= step_hint / 20 or not math.isfinite(way) or way == 0:
        return ""
    halfway = track.points["step"][(track.points["value"] - first.value) / way >= 0.5]
    if halfway.empty or halfway.iloc[0] > step_hint / 100:
        return ""
    return (
        f"{pace:,.1f} s per step, so only {fitting:,.0f} of the workload's {step_hint:,.0f} steps "
        "would fit into its time limit, yet the metric went halfway to the target by step "
        f"{halfway.iloc[0]:,.0f}"
    )
