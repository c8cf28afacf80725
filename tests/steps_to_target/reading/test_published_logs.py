"""Published AlgoPerf logs, where samples of them are at hand.

Looked for in the folder named by STEPS_TO_TARGET_LOGS, else in ../shared/data/algoperf_logs
beside the project.
"""

import os
from pathlib import Path

import pytest

from steps_to_target import Status, load_runs, performance_profile, summarize

PROJECT = Path(__file__).parents[3]
LOGS = Path(
    os.environ.get("STEPS_TO_TARGET_LOGS", PROJECT.parent / "shared" / "data" / "algoperf_logs")
)

pytestmark = pytest.mark.skipif(
    not LOGS.is_dir(), reason=f"no samples of published logs at {LOGS} (STEPS_TO_TARGET_LOGS)"
)


@pytest.fixture(scope="module")
def runs():
    return load_runs([LOGS])


def _run(runs, method, workload, trial):
    return next(
        r for r in runs if (r.method, r.workload, r.trial) == (method, workload, str(trial))
    )


@pytest.mark.parametrize(
    ("method", "workload", "trial", "step", "seconds", "before"),
    [
        ("v06_shampoo", "ogbg", 4, 10_138, 2_652.8, 9_205),
        ("v06_baseline", "ogbg", 5, 23_080, 5_060.2, 21_972),
        ("v06_shampoo", "imagenet_vit", 2, 82_295, 41_094.6, 81_324),
        ("v05_shampoo_submission", "imagenet_vit", 2, 80_983, 32_258.6, 79_932),
    ],
)
def test_reached(runs, method, workload, trial, step, seconds, before):
    run = _run(runs, method, workload, trial)
    assert run.status is Status.REACHED
    assert run.crossing.step == step
    assert run.crossing.seconds == pytest.approx(seconds, abs=0.05)
    assert run.crossing.previous_step == before


@pytest.mark.parametrize(
    ("method", "workload", "trial", "status"),
    [
        ("v06_shampoo", "ogbg", 1, Status.CUT_SHORT),
        ("v06_baseline", "ogbg", 1, Status.OUT_OF_TIME),
        ("v06_baseline", "imagenet_vit", 2, Status.CRASHED),
    ],
)
def test_not_reached(runs, method, workload, trial, status):
    assert _run(runs, method, workload, trial).status is status


def test_outer_steps_are_noticed_in_the_one_run_that_has_them(runs):
    assert [run.method for run in runs if not run.steps_comparable] == ["v05_lawa_queue"]
    assert any("outer steps only" in text for text in summarize(runs).warnings)


def test_score_names_its_subset(runs):
    profile = performance_profile(summarize(runs), ["ogbg"])
    assert profile.workloads == ("ogbg",)
    assert min(ratios["ogbg"] for ratios in profile.ratios.values()) == 1
    baseline, shampoo = (profile.ratios[name]["ogbg"] for name in ("v06_baseline", "v06_shampoo"))
    assert baseline / shampoo == pytest.approx(5_060.175 / 2_652.818, rel=1e-5)


def test_perplexity_falls(runs):
    found = {run.method: run.crossing.step for run in runs if run.workload == "finewebedu_lm"}
    if not found:
        pytest.skip("no runs of the language model among these logs")
    assert found["a100_muon_torch"] == 39_534
    assert found["a100_ademamix"] == 44_311
