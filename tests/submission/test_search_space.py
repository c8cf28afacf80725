"""The search space that the submission ships is valid under AlgoPerf's rules and our own."""

import json
from pathlib import Path

from submission.hyperparameters import Hyperparameters

ROOT = Path(__file__).parents[2]


def test_at_most_five_points_all_of_them_valid_and_different():
    points = json.loads((ROOT / "tuning_search_space.json").read_text())
    assert 1 <= len(points) <= 5
    # AlgoPerf reads the names from the first point and asks them of all others.
    assert all(point.keys() == points[0].keys() for point in points)
    read = {Hyperparameters.from_tuning_point(point) for point in points}
    assert len(read) == len(points)


def test_no_point_depends_on_a_workload():
    # Lengths in steps belong to a workload; the schedule must follow its step hint.
    for point in json.loads((ROOT / "tuning_search_space.json").read_text()):
        assert not {"training_steps", "warmup_steps"} & set(point)
