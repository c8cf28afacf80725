"""AlgoPerf's files are whole or old, its version is its own, and wandb knows what is running."""

import errno
import json
import subprocess
from types import SimpleNamespace

import pandas as pd
import pytest

from steps_to_target import load_runs
from steps_to_target.wandb_runs.names import DESCRIPTION
from workloads_overrides import records


def write_to_csv(metrics, csv_path):
    """What AlgoPerf's function of that name does."""
    try:
        measurements = pd.concat([pd.read_csv(csv_path), pd.DataFrame([metrics])])
    except FileNotFoundError:
        measurements = pd.DataFrame([metrics])
    with open(csv_path, "w") as file:
        measurements.to_csv(file, index=False)


def write_json(name, log_dict, indent=2):
    with open(name, "w") as file:
        file.write(json.dumps(log_dict, indent=indent))


@pytest.fixture
def logger_utils():
    module = SimpleNamespace(
        write_to_csv=write_to_csv,
        write_json=write_json,
        get_meta_data=lambda workload, rng_seed=None: {"git_commit_hash": "of this project"},
        set_up_loggers=lambda train_dir, configs, hyperparameters: "logger",
        wandb=None,
    )
    records.register_records(module, "0123456789abcdef")
    return module


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_rows_are_added_and_nothing_else_stays(logger_utils, tmp_path):
    path = tmp_path / "measurements.csv"
    for step in (1, 2):
        logger_utils.write_to_csv({"global_step": step}, str(path))
    logger_utils.write_json(str(tmp_path / "meta_data_0.json"), {"a": 1})
    assert path.read_text() == "global_step\n1\n2\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["measurements.csv", "meta_data_0.json"]


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_leaves_the_log_as_it_was(logger_utils, tmp_path, monkeypatch, after):
    path = tmp_path / "measurements.csv"
    logger_utils.write_to_csv({"global_step": 1}, str(path))
    before = path.read_text()
    if after:
        monkeypatch.setattr(records.os, "replace", full_disk)
    else:
        monkeypatch.setattr(pd.DataFrame, "to_csv", full_disk)
    with pytest.raises(OSError, match="No space left"):
        logger_utils.write_to_csv({"global_step": 2}, str(path))
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["measurements.csv"]


def test_other_ranks_write_nothing(tmp_path):
    module = SimpleNamespace(
        write_to_csv=lambda metrics, path: None,
        write_json=lambda name, log_dict: None,
        get_meta_data=dict,
        set_up_loggers=None,
    )
    records.register_records(module, "")
    module.write_json(str(tmp_path / "meta_data_0.json"), {})
    assert list(tmp_path.iterdir()) == []
    assert module.get_meta_data() == {}


def test_meta_data_name_algoperfs_commit(logger_utils):
    meta = logger_utils.get_meta_data("workload", 3)
    assert meta[records.COMMIT_KEY] == "0123456789abcdef"


def test_commit_of_a_clone_of_an_installation_and_of_neither(tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    (clone / "algoperf").mkdir(parents=True)
    (clone / "submission_runner.py").touch()
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert records.algoperf_commit(clone / "algoperf") == head.stdout.strip()

    # Installed inside another repository, whose commit it must not take for its own.
    inside = clone / "venv" / "site-packages"
    (inside / "algoperf").mkdir(parents=True)
    (inside / "submission_runner.py").touch()
    monkeypatch.setattr(records.sys, "prefix", str(clone / "venv"))
    (clone / "venv" / records.STAMP).write_text("fedcba9876543210 requirements\n")
    assert records.algoperf_commit(inside / "algoperf") == "fedcba9876543210"
    (clone / "venv" / records.STAMP).unlink()
    monkeypatch.setattr(records.metadata, "version", lambda name: "0.6.0")
    assert records.algoperf_commit(inside / "algoperf") == "version 0.6.0"


class Wandb:
    """Remembers what it is told."""

    def __init__(self):
        self.started, self.config = [], self
        self.settings = {}

    def init(self, **given):
        self.started.append(given)

    def update(self, entries, allow_val_change=False):
        self.settings |= entries


def _trial(folder, stop=None):
    folder.mkdir(parents=True, exist_ok=True)
    meta = {
        "workload.target_metric_name": "mean_average_precision",
        "workload.validation_target_value": 0.25,  # not AlgoPerf's, so wandb has to be told
        "workload.max_allowed_runtime_sec": 500,
    }
    (folder / "hparams.json").write_text(json.dumps({"learning_rate": 0.1}))
    (folder / "meta_data_0.json").write_text(json.dumps(meta))
    flags = {"workload": "ogbg", "framework": "pytorch", "experiment_name": "x"}
    (folder / "flags_0.json").write_text(json.dumps(flags))
    return folder


def _set_up(module, trial):
    def set_up_loggers(train_dir, configs, hyperparameters):
        module.wandb.init(dir=train_dir, tags=["ogbg", "pytorch"])
        return "logger"

    module.set_up_loggers = set_up_loggers
    records.register_records(module, "")
    configs = SimpleNamespace(use_wandb=True)
    return module.set_up_loggers(str(trial), configs, None)


def test_a_live_run_is_named_and_described_and_goes_on_as_itself(tmp_path, logger_utils):
    trial = _trial(tmp_path / "kfac" / "study_3" / "ogbg_pytorch" / "trial_2")
    logger_utils.wandb = Wandb()
    assert _set_up(logger_utils, trial) == "logger"
    (given,) = logger_utils.wandb.started
    assert given["name"] == "kfac ogbg s3 t2"
    assert (given["group"], given["job_type"]) == ("ogbg/kfac", "study_3")
    assert given["project"] == "kfac-algoperf"
    assert given["tags"] == ["ogbg", "pytorch"]
    assert "resume" not in given
    known = logger_utils.wandb.settings[DESCRIPTION]
    assert known["identity"]["trial"] == "2"
    assert known["meta"]["workload.validation_target_value"] == 0.25
    logger_utils.wandb = Wandb()
    _set_up(logger_utils, trial)
    (again,) = logger_utils.wandb.started
    assert (again["id"], again["resume"]) == (given["id"], "allow")


def test_what_a_user_names_stays(tmp_path, logger_utils, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "my run")
    logger_utils.wandb = Wandb()
    _set_up(logger_utils, _trial(tmp_path / "kfac" / "ogbg_pytorch" / "trial_1"))
    (given,) = logger_utils.wandb.started
    assert not {"project", "name"} & given.keys()
    assert given["group"] == "ogbg/kfac"


@pytest.mark.parametrize("reached", [True, False])
def test_a_live_run_and_its_folder_give_the_same_verdict(tmp_path, logger_utils, reached):
    from steps_to_target.wandb_runs.read import read_service

    trial = _trial(tmp_path / "kfac" / "study_3" / "ogbg_pytorch" / "trial_2")
    logger_utils.wandb = Wandb()
    _set_up(logger_utils, trial)
    history = []
    for step, seconds, value in ((1, 2.0, 0.1), (50, 200.0, 0.2), (100, 501.5, 0.1 + reached)):
        row = {
            "global_step": step,
            "accumulated_submission_time": seconds,
            "score": seconds,
            "total_duration": seconds,
            "validation/mean_average_precision": value,
            "test/mean_average_precision": value,
        }
        history.append(row)
        logger_utils.write_to_csv(row, str(trial / "eval_measurements.csv"))
        logger_utils.write_to_csv(row, str(trial / "measurements.csv"))
    last = {"score": 501.5, "global_step": 100}
    history.append(last)
    logger_utils.write_to_csv(last, str(trial / "measurements.csv"))
    item = SimpleNamespace(
        id="x",
        name="n",
        group="",
        job_type="",
        config=logger_utils.wandb.settings,
        scan_history=lambda: iter(history),
    )
    (live,) = read_service("me/project", api=SimpleNamespace(runs=lambda path: [item]))
    (kept,) = load_runs([tmp_path])
    assert live.identity == kept.identity
    assert (live.status, live.evidence) == (kept.status, kept.evidence)
    assert (live.crossing, live.test_crossing, live.target) == (
        kept.crossing,
        kept.test_crossing,
        kept.target,
    )
    assert str(kept.status) == ("reached" if reached else "out of time")
