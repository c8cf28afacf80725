"""Checks the tuning points of this project's submission before AlgoPerf builds data and model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workloads_overrides.errors import LaunchError

OWN_SUBMISSION = Path(__file__).resolve().parents[1] / "submission" / "submission.py"


def require_valid_points(
    points: Iterable[Mapping[str, Any]], submission: Path, source: str
) -> None:
    """Checks points as the submission will, if it is this project's; others are left alone.

    Args:
        points: Hyperparameters by name.
        submission: The file that `--submission_path` names.
        source: Where the points come from, for the message.

    Raises:
        LaunchError: A point is not valid.
    """
    if submission.resolve() != OWN_SUBMISSION:
        return
    from submission.hyperparameters import HyperparameterError, Hyperparameters

    for number, point in enumerate(points, start=1):
        try:
            Hyperparameters.from_tuning_point(point)
        except HyperparameterError as error:
            raise LaunchError(f"{source}, point {number}: {error}") from error
