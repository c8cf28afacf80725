import pytest

from workloads_overrides.budgets import PAPER_BUDGETS, paper_budget
from workloads_overrides.errors import LaunchError


def test_the_references_train_for_the_steps_of_the_paper():
    assert {name: budget.training_steps for name, budget in PAPER_BUDGETS.items()} == {
        "ogbg": 60_000,
        "imagenet_vit": 140_000,
    }


def test_overrides_name_properties_that_every_workload_has():
    for budget in PAPER_BUDGETS.values():
        assert set(budget.overrides()) == {
            "step_hint",
            "max_allowed_runtime_sec",
            "validation_target_value",
            "test_target_value",
        }


def test_another_workload_is_refused():
    with pytest.raises(LaunchError, match=r"no run of workload 'wmt', only of ogbg, imagenet_vit"):
        paper_budget("wmt")
