from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quickstart import runner
from quickstart.errors import QuickstartError

Flags = Callable[..., list[str]]
TIMES = ("score", "total_duration", "accumulated_")


def trial(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "sgd" / "study_0" / "molecules_pytorch" / "trial_1"


def rows(path: Path) -> list[dict[str, str]]:
    """Rows without wall-clock times and the number of restarts."""
    with path.open(newline="") as file:
        return [
            {k: v for k, v in row.items() if not k.startswith(TIMES) and k != "preemption_count"}
            for row in csv.DictReader(file)
        ]


def final_state(folder: Path, step: int = 9) -> dict[str, Any]:
    content = torch.load(folder / f"checkpoint_{step}", weights_only=True)
    return {
        name: content[name]
        for name in ("model_params", "optimizer_state", "generators", "queue_position")
    }


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_call_order_and_log_files(flags_for: Flags, tmp_path: Path) -> None:
    assert runner.main(flags_for()) == 0
    import sys

    calls = sys.modules["tests.quickstart.sgd_submission"].CALLS
    begin = max(i for i, call in enumerate(calls) if call[0] == "init_optimizer_state")
    expected = [("init_optimizer_state", None)]
    for step in range(9):
        expected += [("data_selection", step), ("update_params", step)]
        if step + 1 in (1, 3, 6, 9):
            expected.append(("prepare_for_eval", step + 1))
    assert calls[begin:] == expected
    folder = trial(tmp_path)
    evaluations = rows(folder / "eval_measurements.csv")
    assert [row["global_step"] for row in evaluations] == ["1", "3", "6", "9"]
    for split in ("train", "validation", "test"):
        for metric in ("loss", "accuracy", "mean_average_precision"):
            assert float(evaluations[0][f"{split}/{metric}"]) >= 0
    with (folder / "eval_measurements.csv").open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert scores == sorted(scores)
    assert scores[0] > 0
    last = rows(folder / "measurements.csv")[-1]
    assert {key for key, value in last.items() if value} == {"global_step"}
    flags = json.loads((folder / "flags_0.json").read_text())
    assert (flags["workload"], flags["framework"]) == ("molecules", "pytorch")
    meta = json.loads((folder / "meta_data_0.json").read_text())
    assert meta["workload.target_metric_name"] == "mean_average_precision"
    assert meta["workload.validation_target_value"] == 2.0
    assert json.loads((folder / "hparams.json").read_text())["learning_rate"] == 0.1


def test_the_clock_leaves_evaluations_out(flags_for: Flags, tmp_path: Path) -> None:
    assert runner.main(flags_for(eval_every=1)) == 0
    with (trial(tmp_path) / "eval_measurements.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    total = float(last["accumulated_submission_time"]) + float(last["accumulated_eval_time"])
    assert total < float(last["total_duration"]) + 1e-3
    assert float(last["accumulated_eval_time"]) > 0


def test_run_ends_when_both_targets_are_met(
    flags_for: Flags, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    met = {"validation_target_value": 0.0, "test_target_value": 0.0}
    assert runner.main(flags_for(**met)) == 0
    record = json.loads((trial(tmp_path) / "quickstart_run.json").read_text())
    assert (record["stop_reason"], record["global_step"]) == ("target", 1)
    assert runner.main(flags_for("--resume_last_run", **met)) == 0
    assert "is complete (it ended by: target); nothing to do" in capfd.readouterr().out
    half = {"validation_target_value": 0.0, "experiment_name": "half"}
    assert runner.main(flags_for(**half)) == 0
    folder = tmp_path / "runs" / "half" / "molecules_pytorch" / "trial_1"
    assert json.loads((folder / "quickstart_run.json").read_text())["stop_reason"] == "steps"


@pytest.mark.parametrize("interrupt_at", [0, 4, 6, 8])
def test_resumed_run_equals_an_undisturbed_one(
    flags_for: Flags,
    tmp_path: Path,
    interrupt_at: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert runner.main(flags_for(experiment_name="whole")) == 0
    monkeypatch.setenv("TEST_INTERRUPT_AT", str(interrupt_at))
    assert runner.main(flags_for()) == 130
    last_line = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"interrupted at step {interrupt_at}: " in last_line
    assert "--resume_last_run" in last_line
    monkeypatch.delenv("TEST_INTERRUPT_AT")
    torch.manual_seed(99)
    assert runner.main(flags_for("--resume_last_run")) == 0
    whole = tmp_path / "runs" / "whole" / "molecules_pytorch" / "trial_1"
    resumed = trial(tmp_path)
    assert_same(final_state(whole), final_state(resumed))
    for name in ("eval_measurements.csv", "measurements.csv"):
        assert rows(whole / name) == rows(resumed / name)
    assert (resumed / "meta_data_1.json").exists() == (interrupt_at > 0)


def kill_and_resume(
    start: Callable[[list[str]], subprocess.Popen[str]],
    flags_for: Flags,
    tmp_path: Path,
    seconds_after_first_checkpoint: float,
) -> None:
    flags = {"max_global_steps": 30, "eval_every": 2}
    if not (tmp_path / "runs" / "whole").exists():
        assert runner.main(flags_for(experiment_name="whole", **flags)) == 0
    # An earlier round's checkpoints would be taken for this process's own.
    shutil.rmtree(trial(tmp_path).parent, ignore_errors=True)
    process = start(flags_for(**flags))
    deadline = time.monotonic() + 300
    while not list(trial(tmp_path).glob("checkpoint_*")):
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(seconds_after_first_checkpoint)
    process.kill()
    process.communicate()
    assert not (trial(tmp_path) / "checkpoint_30").exists()
    assert runner.main(flags_for("--resume_last_run", **flags)) == 0
    whole = tmp_path / "runs" / "whole" / "molecules_pytorch" / "trial_1"
    assert_same(final_state(whole, 30), final_state(trial(tmp_path), 30))
    assert rows(whole / "eval_measurements.csv") == rows(trial(tmp_path) / "eval_measurements.csv")
    assert rows(whole / "measurements.csv") == rows(trial(tmp_path) / "measurements.csv")


def test_killed_run_resumes(
    flags_for: Flags,
    tmp_path: Path,
    runner_process: Callable[[list[str]], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_SLEEP", "0.1")
    kill_and_resume(runner_process, flags_for, tmp_path, 0.7)


@pytest.mark.slow
def test_runs_killed_at_twenty_random_moments_resume(
    flags_for: Flags,
    tmp_path: Path,
    runner_process: Callable[[list[str]], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_SLEEP", "0.1")
    moments = random.Random(0)
    for _ in range(20):
        kill_and_resume(runner_process, flags_for, tmp_path, moments.uniform(0, 2))


def test_ctrl_c_gives_one_line_and_keeps_the_run(
    flags_for: Flags,
    tmp_path: Path,
    runner_process: Callable[[list[str]], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_SLEEP", "0.2")
    process = runner_process(flags_for(max_global_steps=1000))
    while not list(trial(tmp_path).glob("checkpoint_*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "add --resume_last_run to go on from step" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        ([], {"workload": None}, "--workload must be given"),
        ([], {"workload": "ogbg"}, r"flag --workload=ogbg.*molecules\|images"),
        ([], {"framework": "jax"}, "flag --framework=jax.*pytorch"),
        ([], {"submission_path": "nowhere.py"}, "--submission_path: nowhere.py is no Python file"),
        ([], {"submission_path": __file__}, "lacks get_batch_size, init_optimizer_state"),
        ([], {"tuning_search_space": None}, "--tuning_search_space must be given"),
        ([], {"tuning_search_space": "nowhere.json"}, "cannot read nowhere.json"),
        ([], {"max_global_steps": 0}, "flag --max_global_steps=0.*positive"),
        ([], {"max_global_steps": "many"}, "flag --max_global_steps=many.*Number of steps"),
        ([], {"rng_seed": -1}, "flag --rng_seed=-1.*non-negative"),
        ([], {"batch_size": 10_000}, "fewer than the 10000"),
        ([], {"data_dir": "/nowhere"}, "no molecules in /nowhere"),
        ([], {"hparam_start_index": 3}, "leave none of the 1 points"),
        ([], {"validation_target_value": "high"}, "flag --validation_target_value=high"),
        (["--max_steps=3"], {}, "max_steps.*--help lists all flags"),
        (["molecules"], {}, "what is 'molecules'"),
        (["--resume_last_run", "--overwrite"], {}, "exclude each other"),
        (["--use_wandb"], {}, "wandb is not installed"),
    ],
)
def test_bad_flags(
    flags_for: Flags, more: list[str], changes: dict[str, Any], message: str
) -> None:
    if more == ["--use_wandb"]:
        import importlib.util

        if importlib.util.find_spec("wandb"):
            pytest.skip("wandb is installed")
    with pytest.raises(QuickstartError, match=message) as error:
        runner.main(flags_for(*more, **changes))
    assert "\n" not in str(error.value)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--help"]) == 0
    assert "--max_global_steps" in capsys.readouterr().out


def test_rejected_hyperparameters_and_changed_settings(flags_for: Flags, tmp_path: Path) -> None:
    point = tmp_path / "bad.json"
    point.write_text('[{"learning_rate": -1, "dropout_rate": 0}]')
    with pytest.raises(QuickstartError, match=r"rejects its hyperparameters: learning_rate is -1"):
        runner.main(flags_for(tuning_search_space=point))
    assert runner.main(flags_for("--overwrite")) == 0
    with pytest.raises(QuickstartError, match=r"holds a run already: --resume_last_run"):
        runner.main(flags_for())
    record = trial(tmp_path) / "quickstart_run.json"
    content = json.loads(record.read_text())
    del content["stop_reason"]
    record.write_text(json.dumps(content))
    with pytest.raises(QuickstartError, match="was begun with another settings"):
        runner.main(flags_for("--resume_last_run", rng_seed=1))
    record.write_text("damaged")
    with pytest.raises(QuickstartError, match="begin anew with --overwrite"):
        runner.main(flags_for("--resume_last_run"))


def test_two_processes_do_not_share_a_folder(flags_for: Flags, tmp_path: Path) -> None:
    with (
        runner._exclusive(trial(tmp_path)),
        pytest.raises(QuickstartError, match="another process is training in"),
    ):
        runner.main(flags_for("--resume_last_run"))
