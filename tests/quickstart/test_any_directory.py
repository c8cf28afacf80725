"""Training works from any folder, with this project's submission and with a copy of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import REPOSITORY

Flags = Callable[..., list[str]]


def settings(name: str) -> Path:
    return REPOSITORY / "quickstart" / "settings" / "molecules" / name


def train(flags: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """As run.sh starts it: the project is on Python's path, the folder is the user's."""
    return subprocess.run(
        [sys.executable, "-m", "quickstart.runner", *flags],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONSAFEPATH": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("where", ["elsewhere", "inside the submission"])
def test_this_projects_submission(flags_for: Flags, tmp_path: Path, where: str) -> None:
    folders = {
        "elsewhere": tmp_path,
        "inside the submission": REPOSITORY / "submission",
    }
    flags = flags_for(
        submission_path=REPOSITORY / "submission" / "submission.py",
        tuning_search_space=settings("kfac_reduce_nesterov.json"),
        max_global_steps=2,
        eval_every=2,
    )
    result = train(flags, folders[where])
    assert result.returncode == 0, result.stdout + result.stderr
    assert list((tmp_path / "runs").rglob("eval_measurements.csv"))


def test_a_copy_of_the_submission(flags_for: Flags, tmp_path: Path) -> None:
    """As `./run.sh package` makes it for AlgoPerf's submissions repository."""
    copy = tmp_path / "external_tuning" / "kfac"
    shutil.copytree(REPOSITORY / "submission", copy)
    flags = flags_for(
        submission_path=copy / "submission.py",
        tuning_search_space=settings("kfac_reduce_nesterov.json"),
        max_global_steps=2,
        eval_every=2,
    )
    result = train(flags, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_paths_are_the_users(flags_for: Flags, tmp_path: Path) -> None:
    """Relative ones are relative to the folder that the user is in."""
    point = json.loads(settings("nesterov.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(point))
    flags = flags_for(
        submission_path=REPOSITORY / "submission" / "submission.py",
        tuning_search_space="mine.json",
        experiment_dir="here",
        max_global_steps=1,
    )
    result = train(flags, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list((tmp_path / "here").rglob("hparams.json"))
