"""The numbers of the paper's C.3 and C.4, written down once more from its text."""

import json
from pathlib import Path

import pytest

from submission.hyperparameters import Hyperparameters
from workloads_overrides.budgets import PAPER_BUDGETS

PAPER = Path(__file__).parents[2] / "workloads_overrides" / "paper"
WORKLOADS = sorted(PAPER_BUDGETS)
FIGURES = (*WORKLOADS, "every_step")
METHODS = ("reference", "kfac_expand", "kfac_reduce")

REFERENCES = {
    "ogbg": {
        "update_rule": "nesterov",
        "learning_rate": 2.4917728606918423,
        "beta1": 0.9449369031171744,
        "weight_decay": 1.2859640541025928e-7,
        "schedule": "warmup_linear",
        "warmup_steps": 3000,
        "training_steps": 60_000,
        "decay_steps_factor": 0.861509027839639,
        "end_factor": 1e-3,
    },
    "imagenet_vit": {
        "update_rule": "nadamw",
        "learning_rate": 0.0008445074561975979,
        "beta1": 0.8895758153482813,
        "beta2": 0.9978504782314613,
        "epsilon": 1e-8,
        "weight_decay": 0.08135402759553023,
        "schedule": "warmup_cosine",
        "warmup_steps": 6999,
        "training_steps": 140_000,
    },
    "every_step": {
        "update_rule": "nadamw",
        "learning_rate": 0.001997,
        "beta1": 0.7132,
        "beta2": 0.9982,
        "epsilon": 1e-8,
        "weight_decay": 0.026595,
        "schedule": "warmup_cosine",
        "warmup_steps": 14_075,
        "training_steps": 140_000,
        "grad_clip": 1.0,
    },
}
CHOSEN = {
    ("ogbg", "kfac_expand"): (9.96871902194967, 0.7881965339190345),
    ("ogbg", "kfac_reduce"): (0.5885756514016359, 0.0579230193904011),
    ("imagenet_vit", "kfac_expand"): (0.0012662938340704357, 0.00016524019235426572),
    ("imagenet_vit", "kfac_reduce"): (0.0012662938340704357, 0.00016524019235426572),
    ("every_step", "kfac_expand"): (0.001997, 1e-5),
    ("every_step", "kfac_reduce"): (0.001997, 1e-5),
}
SPACES = {"ogbg": ((0.1, 10), (1e-3, 1)), "imagenet_vit": ((1e-4, 1e-2), (1e-4, 1e-2))}
INTERVALS = {"ogbg": (10, 10), "imagenet_vit": (50, 50), "every_step": (1, 10)}


def read(figure, name):
    return json.loads((PAPER / figure / f"{name}.json").read_text())


def settings(figure, method):
    (point,) = read(figure, method)
    return Hyperparameters.from_tuning_point(point)


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("method", METHODS)
def test_the_update_rule_and_its_schedule_are_the_references(figure, method):
    setting = settings(figure, method)
    expected = dict(REFERENCES[figure])
    if method != "reference":
        expected["learning_rate"], damping = CHOSEN[figure, method]
        assert setting.damping == damping
    assert {name: getattr(setting, name) for name in expected} == expected
    assert setting.schedule_factor == (1.0 if method == "reference" else 0.75)
    approx = {"reference": "none", "kfac_expand": "expand", "kfac_reduce": "reduce"}[method]
    assert setting.kfac_approx == approx


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("method", METHODS[1:])
def test_curvature_is_that_of_the_papers_library(figure, method):
    setting = settings(figure, method)
    assert (setting.factor_update_steps, setting.inverse_update_steps) == INTERVALS[figure]
    assert (setting.fisher_type, setting.mc_samples) == ("mc", 1)
    assert (setting.damping_kind, setting.bias, setting.norm_rows) == (
        "asdl",
        "output",
        "positions",
    )
    assert not setting.early_updates
    assert setting.ragged_scaling == "sqrt"
    # ASDL's ema_decay, beta2, is the weight of the new factor.
    old = 1 - setting.beta2 if figure == "every_step" else 0.0
    assert setting.factor_decay == pytest.approx(old, abs=1e-15)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_the_chosen_point_is_one_of_the_search_space(workload, approx):
    space, (chosen,) = read(workload, f"search_{approx}"), read(workload, f"kfac_{approx}")
    assert space.keys() == chosen.keys()
    for name, (low, high) in zip(("learning_rate", "damping"), SPACES[workload], strict=True):
        assert space[name] == {"min": low, "max": high, "scaling": "log"}
        assert low <= chosen.pop(name) <= high
        del space[name]
    assert {name: values["feasible_points"] for name, values in space.items()} == {
        name: [value] for name, value in chosen.items()
    }


@pytest.mark.parametrize("figure", FIGURES)
def test_schedules_have_the_budgets_steps(figure):
    workload = "imagenet_vit" if figure == "every_step" else figure
    for method in METHODS:
        assert settings(figure, method).training_steps == PAPER_BUDGETS[workload].training_steps
