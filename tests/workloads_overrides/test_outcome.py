import pytest

from workloads_overrides.errors import LaunchError
from workloads_overrides.outcome import count_rows, require_evaluations


def trial(folder, number, text):
    path = folder / f"trial_{number}" / "eval_measurements.csv"
    path.parent.mkdir()
    path.write_text(text)


def test_a_run_that_evaluated_passes(tmp_path):
    trial(tmp_path, 1, "global_step,loss\n1,0.5\n")
    require_evaluations(tmp_path)


def test_a_trial_without_an_evaluation_is_named(tmp_path):
    trial(tmp_path, 1, "global_step,loss\n1,0.5\n")
    trial(tmp_path, 2, "global_step,loss\n")
    with pytest.raises(LaunchError, match="trial_2 has no evaluation"):
        require_evaluations(tmp_path)


def test_no_trial_at_all_is_an_error(tmp_path):
    with pytest.raises(LaunchError, match="left no trial folder"):
        require_evaluations(tmp_path)


def test_a_missing_file_has_no_rows(tmp_path):
    assert count_rows(tmp_path / "eval_measurements.csv") == 0
