"""What of the image can be checked without a Docker engine."""

import re
from pathlib import Path

import pytest

from workloads_overrides.installation import ALGOPERF_COMMIT

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")


def instructions(name):
    return re.findall(rf"^{name} (.*)$", INSTRUCTIONS, flags=re.MULTILINE)


def test_the_image_holds_the_commit_that_everything_else_is_tested_with():
    assert f"ALGOPERF_COMMIT={ALGOPERF_COMMIT}" in instructions("ARG")
    assert f'ALGOPERF_COMMIT="{ALGOPERF_COMMIT}"' in (ROOT / "run.sh").read_text()


def test_the_container_does_not_run_as_root():
    assert instructions("USER")[-1] == "${USER_ID}"
    assert "USER_ID=1000" in instructions("ARG")


def test_the_container_is_run_sh():
    assert instructions("ENTRYPOINT") == ['["./run.sh"]']


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
