from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quickstart import parallel, settings, study, tuning
from quickstart.errors import QuickstartError

from .conftest import REPOSITORY, SUBMISSION

GOOD, BAD = {"learning_rate": 0.1, "dropout_rate": 0.1}, {"learning_rate": -1, "dropout_rate": 0.1}


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings with two good methods and one whose hyperparameters are rejected."""
    folder = tmp_path / "settings" / "molecules"
    folder.mkdir(parents=True)
    for name, point in {"slow": GOOD, "fast": {**GOOD, "learning_rate": 0.2}, "bad": BAD}.items():
        (folder / f"{name}.json").write_text(json.dumps([point]))
    shared: dict[str, Any] = {
        "comparisons": [
            {
                "reference": "slow",
                "methods": ["slow", "fast"],
                "validation_target_value": 0.0,
                "test_target_value": 2.0,
            }
        ],
        "seeds": [0],
        "max_global_steps": 4,
    }
    (folder / "study.json").write_text(json.dumps(shared))
    grid = {"slow": {"grid": {"learning_rate": [0.1, -1]}}, "fast": {"points": [{}]}}
    (folder / "tuning.json").write_text(json.dumps(grid))
    tried = {"points": [{"method": "slow"}, {"method": "slow"}, {"method": "fast"}]}
    (folder / "tuning_results.json").write_text(json.dumps(tried))
    monkeypatch.setattr(settings, "SETTINGS", tmp_path / "settings")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # The training sets of tests are smaller than the workload's batch.
    monkeypatch.setattr("quickstart.workloads.MoleculesWorkload.default_batch_size", 16)
    submission = tmp_path / "submission16.py"
    text = SUBMISSION.read_text().replace("raise ValueError(workload_name)", "return 16")
    submission.write_text(text)
    return submission


@pytest.fixture
def arguments(methods: Path, data_dir: Path, tmp_path: Path) -> list[str]:
    return [
        f"--submission_path={methods}",
        f"--data_dir={data_dir}",
        f"--experiment_dir={tmp_path / 'runs'}",
    ]


def test_study_runs_reports_and_reuses(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert study.main(arguments) == 0
    told = capsys.readouterr().out
    assert "points tried in tuning: slow 2, fast 1" in told
    assert "slow/study_0: done in" in told
    assert "reference" in told
    assert (runs / "compared_with_slow.png").stat().st_size > 1000
    assert "fast" in (runs / "compared_with_slow.txt").read_text()
    assert json.loads((runs / "tuning.json").read_text())["points"][0] == {"method": "slow"}
    record = runs / "slow" / "study_0" / "molecules_pytorch" / "trial_1" / "quickstart_run.json"
    before = record.stat().st_mtime_ns
    # A third method fails; the runs that are complete are reused.
    assert study.main([*arguments, "--methods", "slow", "fast", "bad"]) == 1
    output = capsys.readouterr()
    assert "2 of 3 runs in" in output.out
    assert "bad/study_0: failed: error: the submission rejects its hyperparameters" in output.out
    assert f"(log: {runs / 'logs' / 'bad_0.log'})" in output.out
    assert "1 runs failed: bad/study_0" in output.err
    assert record.stat().st_mtime_ns == before
    # Other settings: done again.
    plan_arguments = [*arguments, "--methods", "slow", "--max_global_steps", "3"]
    assert study.main(plan_arguments) == 0
    assert "1 of 1 runs were made with other settings" in capsys.readouterr().out
    assert json.loads(record.read_text())["settings"]["max_global_steps"] == 3


def test_study_refuses_unknown_names(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(QuickstartError, match=r"no method 'quick' .*: bad, fast, slow"):
        study.main([*arguments, "--methods", "quick"])
    with pytest.raises(QuickstartError, match="no method 'tuning'"):
        study.main([*arguments, "--methods", "tuning"])
    with pytest.raises(SystemExit):
        study.main([*arguments, "--jobs", "0"])
    assert "--jobs: 0 is not 1 or more" in capsys.readouterr().err.splitlines()[-1]


def test_tuning_keeps_every_point(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuning.main([*arguments, "--write_settings", "--validation_target_value=0.01"]) == 0
    content = json.loads((tmp_path / "runs" / "tuning.json").read_text())
    found = [(p["method"], p["hyperparameters"]["learning_rate"]) for p in content["points"]]
    assert found == [("fast", 0.2), ("slow", 0.1), ("slow", -1)]
    _, slow, rejected = content["points"]
    assert slow["steps_to_target"] == 1
    assert slow["seconds_to_target"] > 0
    assert 0 < slow["best_value"] <= 1
    assert rejected["steps_to_target"] is None
    assert "learning_rate is -1" in rejected["problem"]
    assert json.loads((settings.SETTINGS / "molecules" / "slow.json").read_text()) == [GOOD]
    assert "all 3 points" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"slow": {"grid": {"momentum": [1]}}}, "slow has no hyperparameter momentum"),
        ({"slow": {"values": []}}, 'slow needs "grid" or "points"'),
        ({"fast": {"points": []}}, "has no grid for slow; it has: fast"),
    ],
)
def test_bad_grids(methods: Path, content: dict[str, Any], message: str) -> None:
    (settings.SETTINGS / "molecules" / "tuning.json").write_text(json.dumps(content))
    with pytest.raises(QuickstartError, match=message):
        tuning.read_grids("molecules", ["slow"])


@pytest.fixture
def stub_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replaces `quickstart.runner` in child processes by a few lines of Python."""

    def install(code: str) -> None:
        package = tmp_path / "stub" / "quickstart"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "runner.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
        monkeypatch.chdir(tmp_path)

    return install


def run_jobs(tmp_path: Path, count: int, at_once: int) -> list[parallel.Outcome]:
    from rich.console import Console

    jobs = [parallel.Job(f"job {i}", [str(i)], tmp_path / f"{i}.log") for i in range(count)]
    return parallel.run_jobs(jobs, at_once=at_once, steps=10, metric="accuracy", console=Console())


def test_jobs_run_side_by_side_with_one_thread_each(
    stub_runner: Callable[[str], None], tmp_path: Path
) -> None:
    stub_runner(
        "import os, sys, time\n"
        "print(time.time(), os.environ['OMP_NUM_THREADS'])\n"
        "time.sleep(0.6)\n"
        "print(time.time())\n"
        "sys.exit('third fails' if sys.argv[1] == '2' else 0)\n"
    )
    outcomes = {outcome.job.name: outcome for outcome in run_jobs(tmp_path, 4, at_once=2)}
    assert [outcomes[f"job {i}"].code for i in range(4)] == [0, 0, 1, 0]
    assert outcomes["job 2"].last_line == "third fails"
    spans = []
    for i in range(4):
        first, last, *_ = (tmp_path / f"{i}.log").read_text().splitlines()
        begin, threads = first.split()
        assert threads == "1"
        spans.append((float(begin), float(last)))
    for moment, _ in spans:
        assert sum(begin <= moment <= end for begin, end in spans) <= 2
    assert any(a < d and c < b for (a, b), (c, d) in [(spans[0], spans[1])])


def test_ctrl_c_stops_all_jobs(tmp_path: Path, stub_runner: Callable[[str], None]) -> None:
    stub_runner(
        "import os, pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        "    pathlib.Path(f'stopped{sys.argv[1]}').touch()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path(f'started{sys.argv[1]}').touch()\n"
        "time.sleep(60)\n"
    )
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "from tests.quickstart.test_study_and_tuning import run_jobs\n"
        "run_jobs(pathlib.Path('.'), 3, at_once=2)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(REPOSITORY)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'stub'}"},
    )
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"started{i}").exists() for i in (0, 1)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert (tmp_path / "stopped0").exists()
    assert (tmp_path / "stopped1").exists()
    assert not (tmp_path / "started2").exists()
