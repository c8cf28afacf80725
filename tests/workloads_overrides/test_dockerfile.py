"""What of the image can be checked without a Docker engine."""

import importlib
import re
from pathlib import Path

import pytest

from quickstart import options
from workloads_overrides import runner_flags
from workloads_overrides.installation import ALGOPERF_COMMIT

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "requirements" / "environments.sh"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")


def instructions(name):
    return re.findall(rf"^{name} (.*)$", INSTRUCTIONS, flags=re.MULTILINE)


def test_the_image_holds_the_commit_that_everything_else_is_tested_with():
    assert f"ALGOPERF_COMMIT={ALGOPERF_COMMIT}" in instructions("ARG")
    assert f'ALGOPERF_COMMIT="{ALGOPERF_COMMIT}"' in ENVIRONMENTS.read_text()


def test_torch_and_the_kernels_that_it_has_to_hold_are_build_arguments():
    """V100s by default; A100s, and torch's release for them, by three arguments."""
    given = instructions("ARG")
    assert {"TORCH_VERSION=2.5.1", "TORCHVISION_VERSION=0.20.1", "CUDA_ARCHITECTURE=sm_70"} <= {
        *given
    }
    (install,) = [run for run in instructions("RUN") if "ALGOPERF_COMMIT" in run]
    assert '"torch==${TORCH_VERSION}" "torchvision==${TORCHVISION_VERSION}"' in install
    assert "assert '${CUDA_ARCHITECTURE}' in flags" in install


def environment():
    return dict(re.findall(r"(\w+)=(\S+)", "\n".join(instructions("ENV"))))


def test_the_container_does_not_run_as_root_unless_it_is_told_to():
    assert instructions("USER") == ["1000"]


def test_whatever_is_written_lies_in_the_mounted_folder():
    """By any user: the folder is everybody's, and home and working directory are in it."""
    assert instructions("VOLUME") == ["/runs"]
    assert instructions("WORKDIR") == ["/runs"]
    assert environment()["HOME"] == "/runs"
    assert environment()["KFAC_RUNS_DIR"] == "/runs"
    assert "mkdir -m 1777 /runs" in DOCKERFILE
    assert "chown" not in INSTRUCTIONS


def test_default_folders_follow_the_image(monkeypatch):
    monkeypatch.setenv("KFAC_RUNS_DIR", "/runs")
    assert options.default_runs() == Path("/runs/quickstart")
    reloaded = importlib.reload(runner_flags)
    assert reloaded.DEFAULTS["experiment_dir"] == "/runs"
    monkeypatch.undo()
    assert importlib.reload(runner_flags).DEFAULTS["experiment_dir"] == "runs"


def test_nothing_is_installed_when_a_container_starts():
    assert environment()["KFAC_NO_SETUP"] == "1"
    assert environment()["VENV_DIR"] == environment()["ALGOPERF_VENV_DIR"] == "/opt/venv"
    assert "-r /tmp/requirements/image.txt" in INSTRUCTIONS
    assert "quickstart.molecules --data_dir=/opt/project/data" in INSTRUCTIONS


def test_the_container_is_run_sh():
    assert instructions("ENTRYPOINT") == ['["/opt/project/run.sh"]']


@pytest.mark.parametrize("instruction", ["ARG", "ENV", "RUN", "COPY"])
def test_no_secret_enters_a_layer(instruction):
    text = "\n".join(instructions(instruction))
    assert not re.search(r"wandb|secret|token|passw|api_?key|\.netrc", text, flags=re.IGNORECASE)


def test_only_named_parts_of_the_project_enter_the_build():
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*"
    entered = {line[1:] for line in lines if line.startswith("!")}
    assert {"run.sh", "submission", "workloads_overrides", "requirements"} <= entered
    assert not entered & {"data", "runs", ".git", ".venv", ".venv-algoperf", "wandb", "."}
