"""Crossing, status and evidence, from rows."""

import math

import pandas as pd
import pytest
from make_fixtures import evaluation, rows_to

from steps_to_target.judge import Budget, counts_outer_steps, judge
from steps_to_target.judge import follow as follow_points
from steps_to_target.model import Ending, Status
from steps_to_target.targets import builtin_target

TARGET = builtin_target("ogbg")


def follow(rows, target):
    """``judge.follow`` on rows of the log."""
    names = (target or TARGET).column, (target or TARGET).test_column
    columns = ("global_step", "accumulated_submission_time", *names)
    points = [[row.get(name, math.nan) for name in columns] for row in rows]
    frame = pd.DataFrame(points, columns=["step", "seconds", "value", "test_value"], dtype=float)
    return follow_points(frame, target)


LIMIT = Budget(seconds=12_011.0)


def _rows(*pairs):
    return [evaluation("ogbg", step, step / 4, value) for step, value in pairs]


def _status(rows, ending, budget=LIMIT, problem="", target=TARGET):
    return judge(follow(rows, target), target, ending, budget, problem)


def test_crossing_and_the_interval_it_lies_in():
    track = follow(_rows((1, 0.02), (100, 0.2), (200, 0.29), (300, 0.30)), TARGET)
    crossing = track.crossing
    assert (crossing.step, crossing.seconds, crossing.value) == (200, 50, 0.29)
    assert (crossing.previous_step, crossing.previous_seconds) == (100, 25)
    status, evidence = judge(track, TARGET, Ending(final_row=True), LIMIT, "")
    assert status is Status.REACHED
    assert "0.29 >= 0.28098 at step 200" in evidence
    assert "step 100" in evidence


def test_crossing_of_a_metric_that_falls():
    target = builtin_target("librispeech_conformer")
    track = follow(rows_to("librispeech_conformer", 9000), target)
    assert track.crossing.value <= target.validation
    assert track.crossing.previous_step < 9000 <= track.crossing.step


def test_reached_at_the_first_evaluation_has_no_interval():
    crossing = follow(_rows((1, 0.5)), TARGET).crossing
    assert crossing.previous_step is None
    assert crossing.previous_seconds is None


def test_validation_and_test_targets_are_crossed_apart():
    rows = [
        evaluation("ogbg", 10, 1.0, 0.29, 0.1),
        evaluation("ogbg", 20, 2.0, 0.2, 0.1),
        evaluation("ogbg", 30, 3.0, 0.2, 0.27),
    ]
    track = follow(rows, TARGET)
    assert (track.crossing.step, track.test_crossing.step) == (10, 30)


def test_missed_when_the_run_ended_by_itself():
    status, evidence = _status(_rows((1, 0.1), (9, 0.2)), Ending(True, 9, 40.0))
    assert status is Status.MISSED
    assert "best validation/mean_average_precision 0.2" in evidence


def test_missed_when_the_step_budget_is_used_up():
    status, evidence = _status(
        _rows((1, 0.1), (9, 0.2)), Ending(True, 9, 40.0), Budget(12_011.0, 9.0)
    )
    assert status is Status.MISSED
    assert "step budget of 9" in evidence


def test_out_of_time():
    status, evidence = _status(_rows((1, 0.1), (9, 0.2)), Ending(True, 12, 12_012.5))
    assert status is Status.OUT_OF_TIME
    assert "12,012.5 s" in evidence
    assert "limit 12,011 s" in evidence


def test_cut_short_without_a_final_row():
    status, evidence = _status(_rows((1, 0.1), (900, 0.2)), Ending(False, 950, 225.0))
    assert status is Status.CUT_SHORT
    assert "last logged step 950" in evidence


def test_crashed_after_the_first_evaluation_or_with_a_broken_loss():
    assert _status(_rows((1, 0.1)), Ending(False, 1, 1.0))[0] is Status.CRASHED
    status, evidence = _status(_rows((1, 0.1), (9, 0.2)), Ending(False, 12, 3.0, math.nan))
    assert status is Status.CRASHED
    assert "training loss nan" in evidence


def test_without_any_evaluation():
    assert _status([], Ending(False, 7))[0] is Status.CRASHED
    assert _status([], Ending(True, 7, 3.0))[0] is Status.UNREADABLE


def test_unknown_target_and_missing_column_are_said():
    status, evidence = _status(_rows((1, 0.1)), Ending(True), target=None)
    assert status is Status.UNREADABLE
    assert "--target" in evidence
    rows = [{"global_step": 1.0, "score": 2.0}]
    status, evidence = _status(rows, Ending(True), problem="no column x")
    assert (status, evidence) == (Status.UNREADABLE, "no column x")


def test_without_measurements_the_time_limit_still_decides():
    rows = [evaluation("ogbg", s, s * 100.0, 0.2) for s in (1, 40, 80, 119)]
    status, evidence = _status(rows, Ending(known=False))
    assert status is Status.OUT_OF_TIME
    assert "no measurements.csv" in evidence
    assert _status(rows[:3], Ending(known=False))[0] is Status.CUT_SHORT


def test_metric_that_turns_nan_is_in_the_evidence():
    rows = _rows((1, 0.1), (9, 0.2), (20, math.nan), (30, math.nan))
    status, evidence = _status(rows, Ending(True, 30, 9.0))
    assert status is Status.MISSED
    assert "NaN from step 20 on" in evidence


def test_resume_replaces_the_evaluations_it_rolled_back():
    rows = _rows((1, 0.1), (100, 0.2), (200, 0.25), (100, 0.21), (200, 0.26), (300, 0.29))
    track = follow(rows, TARGET)
    assert list(track.points["step"]) == [1, 100, 200, 300]
    assert list(track.points["value"]) == [0.1, 0.21, 0.26, 0.29]
    assert (track.went_back, track.repeated) == (1, 0)
    assert (track.crossing.step, track.crossing.previous_step) == (300, 200)
    assert not track.undone


def test_crossing_undone_by_a_resume_counts_as_in_algoperfs_scoring_and_is_said():
    rows = _rows((1, 0.1), (100, 0.29), (50, 0.2), (90, 0.2))
    track = follow(rows, TARGET)
    assert track.crossing.step == 100
    assert track.undone
    assert "went back behind it" in judge(track, TARGET, Ending(), LIMIT, "")[1]


def test_duplicate_steps_keep_the_later_row():
    track = follow(_rows((1, 0.1), (100, 0.2), (100, 0.2), (200, 0.29)), TARGET)
    assert list(track.points["step"]) == [1, 100, 200]
    assert (track.went_back, track.repeated) == (0, 1)


@pytest.mark.parametrize("step", [math.nan, math.inf, -1.0, 1e300])
def test_rows_without_a_usable_step_are_counted(step):
    track = follow([{"global_step": step, TARGET.column: 0.5}, {TARGET.column: 0.5}], TARGET)
    assert (len(track.points), track.unusable, track.crossing) == (0, 2, None)


def test_outer_steps_need_both_signs():
    slow = [evaluation("ogbg", 1 + 3 * i, 240.0 * i, 0.02 + 0.016 * i) for i in range(18)]
    assert "halfway to the target" in counts_outer_steps(
        follow(slow, TARGET), TARGET, 18_477.0, 80_000.0
    )
    usual = follow(rows_to("ogbg", 16_000), TARGET)
    assert counts_outer_steps(usual, TARGET, 12_011.0, 52_000.0) == ""
    # A slow machine is slow, but its metric does not rise in a handful of steps.
    stuck = [evaluation("ogbg", 1 + 3 * i, 240.0 * i, 0.02 + 0.0001 * i) for i in range(18)]
    assert counts_outer_steps(follow(stuck, TARGET), TARGET, 18_477.0, 80_000.0) == ""
    assert counts_outer_steps(follow(slow, TARGET), TARGET, None, None) == ""
