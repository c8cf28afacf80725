"""Did the run evaluate? AlgoPerf logs an error during evaluation and trains on without a result."""

import csv
from pathlib import Path

from workloads_overrides.errors import LaunchError


def require_evaluations(trials: Path) -> None:
    """Checks that every trial's `eval_measurements.csv` has a row.

    Args:
        trials: The folder that holds `trial_*`.

    Raises:
        LaunchError: There is no trial, or one without an evaluation.
    """
    folders = sorted(trials.glob("trial_*"))
    if not folders:
        raise LaunchError(f"the run left no trial folder in {trials}")
    for folder in folders:
        if count_rows(folder / "eval_measurements.csv") == 0:
            raise LaunchError(
                f"{folder} has no evaluation: each one failed. Look above for 'Eval step' errors; "
                "often the data folder does not fit the workload's num_*_examples"
            )


def count_rows(path: Path) -> int:
    """Rows below the header of a CSV file, 0 where there is no file."""
    if not path.is_file():
        return 0
    with path.open(newline="", encoding="utf-8") as file:
        return sum(1 for _ in csv.DictReader(file))
