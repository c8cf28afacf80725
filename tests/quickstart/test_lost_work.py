"""Runs that were refused leave nothing; runs whose disk filled up go on."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quickstart import errors, run_logs, runner
from quickstart.errors import QuickstartError

from .conftest import REPOSITORY
from .test_runner import assert_same, final_state, rows, trial

Flags = Callable[..., list[str]]


@pytest.mark.parametrize(
    "change", [{"damping": -1.0}, {"kfac_approx": "shrink"}, {"no_such_hyperparameter": 1}]
)
def test_a_rejected_hyperparameter_leaves_no_folder(
    flags_for: Flags, tmp_path: Path, change: dict[str, Any]
) -> None:
    settings = REPOSITORY / "quickstart" / "settings" / "molecules" / "kfac_reduce_nesterov.json"
    (point,) = json.loads(settings.read_text())
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps([point | change]))
    flags = flags_for(
        submission_path=REPOSITORY / "submission" / "submission.py", tuning_search_space=wrong
    )
    with pytest.raises(QuickstartError):
        runner.main(flags)
    assert not (tmp_path / "runs").exists()


def test_a_rejected_batch_size_leaves_no_folder(flags_for: Flags, tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match="batch_size"):
        runner.main(flags_for(batch_size=10_000))
    assert not (tmp_path / "runs").exists()


class Disk:
    """A disk that is full from the n-th file that is written whole on."""

    def __init__(self, room: int) -> None:
        self.room = room

    def replace(self, source: Any, target: Any) -> None:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        Path(source).rename(target)


@pytest.mark.parametrize("room", [0, 3, 9])
def test_a_full_disk_leaves_a_run_that_resumes_to_the_same_end(
    flags_for: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    assert runner.main(flags_for(experiment_dir=tmp_path / "whole")) == 0
    whole = tmp_path / "whole" / "sgd" / "study_0" / "molecules_pytorch" / "trial_1"
    with monkeypatch.context() as patch:
        patch.setattr(errors.os, "replace", Disk(room).replace)
        with pytest.raises(QuickstartError, match="the disk is full"):
            runner.main(flags_for())
    assert runner.main(flags_for("--resume_last_run")) == 0
    assert_same(final_state(trial(tmp_path)), final_state(whole))
    for name in (run_logs.EVAL_MEASUREMENTS, run_logs.MEASUREMENTS):
        assert rows(trial(tmp_path) / name) == rows(whole / name)
