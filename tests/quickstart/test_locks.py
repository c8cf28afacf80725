"""One writer a folder, whoever it is, and nothing left of a run that was refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quickstart import locks, runner
from quickstart.errors import QuickstartError

from .conftest import REPOSITORY

Flags = Callable[..., list[str]]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts processes that hold a trial's folder until they are ended."""
    started = []

    def start(trial: Path) -> subprocess.Popen[str]:
        code = (
            "import sys, pathlib; from quickstart import locks\n"
            "with locks.hold(pathlib.Path(sys.argv[1])):\n"
            "    print('held', flush=True); sys.stdin.read()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(trial)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def trial(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "sgd" / "study_0" / "molecules_pytorch" / "trial_1"


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path, writer) -> None:
    first = writer(trial(tmp_path))
    with pytest.raises(locks.RunInUseError, match="another process is training in"):  # noqa: SIM117
        with locks.hold(trial(tmp_path)):
            pass
    first.kill()
    first.wait()
    with locks.hold(trial(tmp_path)):
        pass


@pytest.mark.parametrize("how", ["--overwrite", "--resume_last_run"])
def test_a_live_run_is_neither_deleted_nor_gone_on_with(
    flags_for: Flags, tmp_path: Path, writer, how: str
) -> None:
    folder = trial(tmp_path)
    writer(folder)
    (folder / "eval_measurements.csv").write_text("precious")
    with pytest.raises(QuickstartError, match="another process is training in"):
        runner.main(flags_for(how))
    assert (folder / "eval_measurements.csv").read_text() == "precious"


def test_a_live_second_trial_keeps_the_whole_folder(
    flags_for: Flags, tmp_path: Path, writer
) -> None:
    writer(trial(tmp_path).with_name("trial_2"))
    trial(tmp_path).mkdir()
    with pytest.raises(QuickstartError, match="trial_2"):
        runner.main(flags_for("--overwrite"))
    assert trial(tmp_path).exists()


def test_what_nobody_writes_is_deleted(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / "w_pytorch" / f"trial_{number}"
        folder.mkdir(parents=True)
        (folder / "measurements.csv").touch()
    locks.delete(tmp_path / "w_pytorch")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_no_folder_and_a_refused_resume_keeps_its_own(tmp_path: Path) -> None:
    folder = trial(tmp_path)
    with pytest.raises(KeyError), locks.hold(folder):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    (folder / "hparams.json").touch()
    with pytest.raises(KeyError), locks.hold(folder):
        raise KeyError
    assert (folder / "hparams.json").exists()
