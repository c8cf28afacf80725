"""Real AlgoPerf, real data formats: K-FAC through the unmodified submission_runner, on a CPU.

Needs an interpreter with AlgoPerf: the one that runs the tests, or that of the environment which
`./run.sh setup --algoperf` makes. Takes minutes; without AlgoPerf everything here is skipped.
"""

import csv
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.algoperf, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
FIND = """
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("algoperf", "submission_runner"))))
"""


@dataclass(frozen=True)
class Case:
    """A workload at miniature size, and what its runs evaluate."""

    data: str
    train: int
    evaluation: int
    batch_size: int
    steps: int
    update_rule: str
    learning_rate: float
    metric: str
    eval_period: int


CASES = {
    "ogbg": Case("ogbg", 300, 64, 16, 20, "nesterov", 0.01, "mean_average_precision", 4),
    "imagenet_vit": Case("imagenet", 80, 20, 8, 3, "nadamw", 0.001, "accuracy", 1),
}


@pytest.fixture(scope="module")
def python():
    """An interpreter that can import AlgoPerf."""
    environment = Path(os.environ.get("ALGOPERF_VENV_DIR", ROOT / ".venv-algoperf"))
    for candidate in (sys.executable, str(environment / "bin" / "python")):
        if Path(candidate).exists():
            found = subprocess.run([candidate, "-c", FIND], check=False, capture_output=True)
            if found.returncode == 0:
                return candidate
    pytest.skip("AlgoPerf is not importable here; `./run.sh setup --algoperf` installs it")


@pytest.fixture(scope="module")
def data(python, tmp_path_factory):
    """Miniature data folders by workload."""
    folders = {}
    for workload, case in CASES.items():
        folders[workload] = tmp_path_factory.mktemp("data") / case.data
        sizes = [f"--train={case.train}", f"--evaluation={case.evaluation}"]
        made = start(
            python, ["-m", "workloads_overrides.miniature", case.data, folders[workload], *sizes]
        )
        if made.returncode == 2 and "install with pip" in made.stderr:
            pytest.skip(made.stderr.strip().splitlines()[-1])
        assert made.returncode == 0, made.stderr
    return folders


@pytest.fixture
def runs(tmp_path):
    """A folder for runs; a ViT's checkpoints are too large for pytest to keep them afterwards."""
    yield tmp_path
    for checkpoint in tmp_path.rglob("checkpoint_*"):
        checkpoint.unlink()


def start(python, arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    return subprocess.run(
        [python, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )


def settings(case, approx, folder):
    """A tuning file with one point that updates factors and inverses often."""
    point = {
        "kfac_approx": approx,
        "update_rule": case.update_rule,
        "learning_rate": case.learning_rate,
        "damping": 0.01,
        "factor_update_steps": 2,
        "inverse_update_steps": 2,
        "training_steps": 100,
        "warmup_steps": 1,
    }
    path = folder / f"kfac_{approx}.json"
    path.write_text(json.dumps([point]))
    return path


def launch(python, workload, approx, data_dir, folder, steps, processes=1, space=None):
    """Runs a point; `approx` "self" is the self-tuning ruleset, which takes none."""
    case = CASES[workload]
    tuning = "--tuning_ruleset=self"
    if approx != "self":
        tuning = f"--tuning_search_space={space or settings(case, approx, folder)}"
    launcher = ["-m", "workloads_overrides.launch"]
    if processes > 1:
        launcher = [
            *("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
            *launcher,
        ]
    return start(
        python,
        [
            *launcher,
            "--paper-budget",
            "--miniature",
            f"--batch-size={case.batch_size}",
            # Seconds between evaluations, and so checkpoints: there are some on the way.
            f"--set=eval_period_time_sec={case.eval_period}",
            "--",
            f"--workload={workload}",
            f"--data_dir={data_dir}",
            f"--experiment_dir={folder}",
            f"--experiment_name={approx}",
            tuning,
            f"--max_global_steps={steps}",
            "--rng_seed=1",
            "--notorch_compile",
        ],
    )


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoints(trial):
    return sorted(int(path.name.partition("_")[2]) for path in trial.glob("checkpoint_*"))


def check_evaluations(trial, case, steps):
    """Rows for the three splits, finite, the last of them at the last step."""
    evaluations = rows(trial / "eval_measurements.csv")
    assert len(evaluations) >= 2
    for row in evaluations:
        for split in ("train", "validation", "test"):
            assert 0.0 <= float(row[f"{split}/{case.metric}"]) <= 1.0
            assert math.isfinite(float(row[f"{split}/loss"]))
    assert int(float(evaluations[-1]["global_step"])) == steps
    return evaluations


@pytest.mark.parametrize("approx", ["expand", "reduce", "self"])
@pytest.mark.parametrize("workload", list(CASES))
def test_kfac_trains_evaluates_saves_and_resumes(python, data, runs, workload, approx):
    case = CASES[workload]
    trial = runs / approx / f"{workload}_pytorch" / "trial_1"

    first = launch(python, workload, approx, data[workload], runs, case.steps)
    assert first.returncode == 0, first.stderr[-4000:]
    assert "Eval step" not in first.stderr
    files = {path.name for path in trial.iterdir()}
    assert files >= {
        "eval_measurements.csv",
        "measurements.csv",
        "flags_0.json",
        "meta_data_0.json",
        f"checkpoint_{case.steps}",
    }
    check_evaluations(trial, case, case.steps)
    meta_data = json.loads((trial / "meta_data_0.json").read_text())
    assert meta_data["workload.num_validation_examples"] == case.evaluation
    if approx != "self":
        assert json.loads((trial / "hparams.json").read_text())["kfac_approx"] == approx

    # A finished run is marked as finished; without its last checkpoint it is one that was cut off.
    *_, interrupted_at, last = checkpoints(trial)
    (trial / f"checkpoint_{last}").unlink()
    second = launch(python, workload, approx, data[workload], runs, case.steps + 2)
    assert second.returncode == 0, second.stderr[-4000:]
    assert "Eval step" not in second.stderr
    assert re.search(rf"Loaded checkpoint from \S*checkpoint_{interrupted_at}\b", second.stderr)
    evaluations = check_evaluations(trial, case, case.steps + 2)
    resumed = [row for row in evaluations if int(float(row["preemption_count"])) == 1]
    assert resumed
    assert all(int(float(row["global_step"])) > interrupted_at for row in resumed)
    assert {"flags_1.json", "meta_data_1.json"} <= {path.name for path in trial.iterdir()}


@pytest.mark.parametrize("method", ["reference", "kfac_expand", "kfac_reduce"])
@pytest.mark.parametrize("figure", ["ogbg", "imagenet_vit", "every_step"])
def test_every_point_of_the_paper_trains(python, data, runs, figure, method):
    workload = "imagenet_vit" if figure == "every_step" else figure
    case = CASES[workload]
    space = ROOT / "workloads_overrides" / "paper" / figure / f"{method}.json"
    done = launch(python, workload, method, data[workload], runs, case.steps, space=space)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Eval step" not in done.stderr
    trial = runs / method / f"{workload}_pytorch" / "trial_1"
    check_evaluations(trial, case, case.steps)
    assert json.loads((trial / "hparams.json").read_text()) == json.loads(space.read_text())[0]
    losses = [float(row["loss"]) for row in rows(trial / "measurements.csv") if row.get("loss")]
    assert losses
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("workload", list(CASES))
def test_missing_data_are_named_before_training(python, tmp_path, workload):
    (tmp_path / "imagenet_v2").mkdir()
    done = start(
        python,
        [
            *("-m", "workloads_overrides.launch", "--"),
            *(f"--workload={workload}", f"--data_dir={tmp_path}", "--experiment_name=none"),
        ],
    )
    assert done.returncode == 2
    assert "is missing; get it" in done.stderr
    assert "datasets/dataset_setup.py" in done.stderr


def test_two_processes_train_together_over_gloo(python, data, runs):
    done = launch(python, "ogbg", "reduce", data["ogbg"], runs, steps=6, processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    trial = runs / "reduce" / "ogbg_pytorch" / "trial_1"
    check_evaluations(trial, CASES["ogbg"], steps=6)


def test_a_wrong_setting_is_one_line_before_training(python, data, tmp_path):
    done = start(
        python,
        [
            *("-m", "workloads_overrides.launch", "--set=step_hnit=7", "--"),
            *("--workload=ogbg", f"--data_dir={data['ogbg']}", f"--experiment_dir={tmp_path}"),
            *("--experiment_name=wrong", "--tuning_ruleset=self"),
        ],
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --set step_hnit: OgbgWorkload has no")
    assert list(tmp_path.iterdir()) == []
