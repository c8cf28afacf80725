from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import REPOSITORY

COMMANDS = ["quickstart", "test", "setup", "slurm", "docker", "package", "algoperf", "compare"]
ALL = [*COMMANDS, "docs", "experiments", "benchmarks", "memory"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The parts of the project that run.sh looks at, without an environment."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(REPOSITORY / "run.sh", folder)
    shutil.copytree(REPOSITORY / "requirements", folder / "requirements")
    for package in ("quickstart", "steps_to_target", "workloads_overrides", "submission"):
        (folder / package).symlink_to(REPOSITORY / package)
    return folder


def run(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    ignored = ("VENV_DIR", "NPROC", "PYTHON", "CUDA_VISIBLE_DEVICES")
    kept = {k: v for k, v in os.environ.items() if k not in ignored}
    return subprocess.run(
        [str(project / "run.sh"), *arguments],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_help_lists_all_commands(project: Path) -> None:
    result = run(project, "--help")
    assert result.returncode == 0
    for command in ALL:
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_needs_no_set_up(project: Path, command: str) -> None:
    result = run(project, command, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")
    assert len(result.stdout) > 60
    assert result.stderr == ""
    assert not (project / ".venv").exists()
    assert not (project / ".cache").exists()


def test_help_inside_the_container_reaches_the_command(project: Path) -> None:
    result = run(project, "--dry-run", "docker", "run", "compare", "--help")
    assert result.stdout.rstrip().endswith("kfac-algoperf compare --help")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, " --gpus all "),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, ' --gpus \\"device=2\\,3\\" '),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
    ],
)
def test_a_choice_of_gpus_is_passed_on(
    project: Path, variables: dict[str, str], expected: str | None
) -> None:
    result = run(project, "--dry-run", "docker", "run", "algoperf", **variables)
    assert (expected in result.stdout) if expected else ("--gpus" not in result.stdout)
    assert f"--user {os.getuid()}:{os.getgid()} " in result.stdout
    assert "--env CUDA_VISIBLE_DEVICES" not in result.stdout


def test_the_container_installs_nothing(project: Path) -> None:
    python = project / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    image = {"KFAC_NO_SETUP": "1", "VENV_DIR": str(project / "venv")}
    result = run(project, "compare", "runs", **image)
    assert result.stdout == "-m steps_to_target runs\n"
    assert not (project / ".cache").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "{env}{venv}/bin/python -m quickstart"),
        (["--fresh"], "{env}{venv}/bin/python -m quickstart --fresh"),
        (["quickstart", "--jobs", "1"], "{env}{venv}/bin/python -m quickstart --jobs 1"),
        (
            ["test", "-m", "slow"],
            "cd -- {project} \n{env}{venv}/bin/python -m pytest -n 2 --dist worksteal -m slow",
        ),
        (["compare", "a b"], "{env}{venv}/bin/python -m steps_to_target a\\ b"),
        (["slurm", "--", "--x"], "{env}{venv}/bin/python -m workloads_overrides.slurm -- --x"),
        (["experiments", "x"], "{env}{venv}/bin/python -m experiments x"),
        (["benchmarks"], "{env}{venv}/bin/python -m benchmarks"),
        (["memory", "ogbg"], "{env}{venv}/bin/python -m workloads_overrides.factor_memory ogbg"),
        (["docker", "build"], "docker build --tag kfac-algoperf {project}"),
    ],
)
def test_dry_run_prints_the_command(project: Path, arguments: list[str], expected: str) -> None:
    result = run(project, "--dry-run", *arguments)
    assert result.returncode == 0
    venv, env = project / ".venv", f"env PYTHONPATH={project} PYTHONSAFEPATH=1 "
    assert result.stdout.strip() == expected.format(venv=venv, project=project, env=env)
    assert not venv.exists()


def test_dry_run_of_algoperf_and_docker(project: Path) -> None:
    single = run(project, "algoperf", "--dry-run", "--workload=ogbg")
    assert single.stdout.strip().endswith("-m workloads_overrides.launch --workload=ogbg")
    several = run(project, "--dry-run", "algoperf", "--workload=ogbg", NPROC="4")
    assert " NPROC=4 " in several.stdout
    result = run(project, "--dry-run", "docker", "run", "algoperf", WANDB_API_KEY="secret")
    assert "--env WANDB_API_KEY " in result.stdout
    assert "secret" not in result.stdout


def test_dry_run_of_set_up_names_every_step(project: Path) -> None:
    result = run(project, "--dry-run", "setup", "--dev", "--algoperf")
    lines = result.stdout.splitlines()
    assert len(lines) == 13
    assert not (project / ".cache").exists()
    assert "checkout --quiet 2c90454fc05d5bdf3598b0c7651e611f132a7060" in result.stdout
    assert "requirements/dev.txt" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["fly"], {}, "no command 'fly'; ./run.sh --help lists them"),
        (["setup", "--fast"], {}, "setup knows no '--fast'; it takes --dev"),
        (["setup", "--algoperf-source", "nowhere"], {}, "needs an existing folder"),
        (["setup"], {"PYTHON": "/bin/false"}, "PYTHON=/bin/false is not Python 3.11 or newer"),
        (["docker", "fly"], {}, "docker knows build and run, not 'fly'"),
        (["docker", "run"], {}, "docker run needs a command"),
    ],
)
def test_errors_are_one_line(
    project: Path, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    dry = [] if arguments[0] == "setup" else ["--dry-run"]
    result = run(project, *dry, *arguments, **variables)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_nothing_but_an_environment_is_deleted(project: Path) -> None:
    precious = project / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    result = run(project, "setup", VENV_DIR=str(precious))
    assert result.returncode != 0
    assert "is in the way and no virtual environment" in result.stderr
    assert (precious / "thesis.tex").exists()


FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *"-m venv"*)
    mkdir -p "${@: -1}/bin"
    touch "${@: -1}/pyvenv.cfg"
    cp "$0" "${@: -1}/bin/python" ;;
  "-c "*) ;;
  *"pip install"*)
    echo "$*" >>"$FAKE_LOG"
    [[ -z "${FAKE_FAILURE:-}" ]] || { echo "$FAKE_FAILURE"; exit 1; } ;;
  *quickstart.molecules*) echo "35,633 molecules" ;;
esac
"""


def test_set_up_is_done_once_and_starts_afresh_after_a_failure(project: Path) -> None:
    python = project / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log = project / "pip.log"
    common = {"PYTHON": str(python), "FAKE_LOG": str(log)}
    result = run(project, "setup", FAKE_FAILURE="ERROR: No space left on device", **common)
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: installing packages failed (the disk is full): see ")
    assert not (project / ".venv" / ".stamp-quickstart").exists()
    (project / ".venv" / "left over").touch()
    result = run(project, "setup", **common)
    assert result.returncode == 0, result.stderr
    assert "35,633 molecules" in result.stdout
    assert not (project / ".venv" / "left over").exists()
    installed = log.read_text().count("\n")
    assert run(project, "setup", **common).returncode == 0
    assert log.read_text().count("\n") == installed
    assert run(project, "setup", "--dev", **common).returncode == 0
    assert log.read_text().count("\n") == installed + 3  # slurm.txt, docs.txt and dev.txt
    with (project / "requirements" / "quickstart.txt").open("a") as file:
        file.write("# changed\n")
    assert run(project, "setup", **common).returncode == 0
    assert log.read_text().count("\n") > installed + 1


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(os.sys.executable).parent)
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (./run.sh setup --dev installs it)")
    scripts = [str(REPOSITORY / "run.sh"), str(REPOSITORY / ".ci" / "run")]
    result = subprocess.run(
        [shellcheck, "-x", "-a", *scripts], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
