import json
from pathlib import Path

import pytest

from submission.hyperparameters import Hyperparameters
from workloads_overrides.budgets import PAPER_BUDGETS

PAPER = Path(__file__).parents[2] / "workloads_overrides" / "paper"
WORKLOADS = sorted(PAPER_BUDGETS)
METHODS = ("reference", "kfac_expand", "kfac_reduce")


def points(workload, method):
    """The corners of a search space, or its points."""
    space = json.loads((PAPER / workload / f"{method}.json").read_text())
    if isinstance(space, list):
        return space
    corners = []
    for end in ("min", "max"):
        corner = {}
        for name, values in space.items():
            allowed = values.get("feasible_points")
            assert allowed is None or len(allowed) == 1
            assert allowed is not None or values["scaling"] == "log"
            corner[name] = values[end] if allowed is None else allowed[0]
        corners.append(corner)
    return corners


def read(workload, method):
    return [Hyperparameters.from_tuning_point(point) for point in points(workload, method)]


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_one_that_the_submission_accepts(workload, method):
    expected = {"reference": "none", "kfac_expand": "expand", "kfac_reduce": "reduce"}[method]
    assert {setting.kfac_approx for setting in read(workload, method)} == {expected}


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("method", METHODS)
def test_schedules_have_the_budgets_steps(workload, method):
    for setting in read(workload, method):
        assert setting.training_steps == PAPER_BUDGETS[workload].training_steps
        assert setting.schedule_factor == (1.0 if method == "reference" else 0.75)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_kfac_differs_from_the_reference_in_what_it_adds_and_in_nothing_else(workload):
    (reference,) = points(workload, "reference")
    for method in ("kfac_expand", "kfac_reduce"):
        for point in points(workload, method):
            changed = {name for name in reference if point[name] != reference[name]}
            assert changed == {"kfac_approx", "learning_rate"}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_expand_and_reduce_get_the_same_search(workload):
    expand, reduce = (points(workload, method) for method in ("kfac_expand", "kfac_reduce"))
    for point in (*expand, *reduce):
        del point["kfac_approx"]
    assert expand == reduce
