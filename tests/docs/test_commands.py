"""Every command of README and docs runs: dry where it needs a GPU, a cluster, Docker or hours."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from workloads_overrides import launch, slurm

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "workloads_overrides" / "README.md",
]
BLOCK = re.compile(r"^```(?:sh|bash)?\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands():
    """Lines that start ./run.sh, with continued ones put together and comments left out."""
    found = {}
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split(" #")[0].strip()
                words = line.split()
                line = re.sub(r"\$\{?approx\}?", "reduce", line)  # in loops over both
                usage = "FLAGS OF" in line or "…" in line
                if any(word == "./run.sh" for word in words[:4]) and not usage:
                    found.setdefault(line, page.name)
    return sorted(found.items())


MODULE = re.compile(r"python -m ([a-z_.]+)((?: [^`\n|]*)?)")


def modules():
    """Modules that the pages start by `python -m`, with a word and the flags that they name."""
    found = {}
    for page in PAGES:
        for name, rest in MODULE.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
            words = rest.split(" #")[0].split()
            command = tuple(word for word in words[:1] if re.fullmatch("[a-z_]+", word))
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            found.setdefault((name, *command), set()).update(flags)
    return sorted((start, sorted(flags)) for start, flags in found.items())


def test_modules_are_found():
    assert {"benchmarks", "workloads_overrides.miniature"} <= {start[0] for start, _ in modules()}


@pytest.mark.parametrize(("start", "flags"), modules())
def test_modules_that_pages_name_take_the_flags_that_they_show(start, flags):
    shown = subprocess.run(
        [sys.executable, "-m", *start, "--help"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert [flag for flag in flags if flag not in shown.stdout] == []


def split(line):
    """Variables, and the words behind ./run.sh."""
    words = shlex.split(line)
    cut = words.index("./run.sh")
    return dict(word.split("=", 1) for word in words[:cut]), words[cut + 1 :]


def test_there_are_commands():
    assert len(commands()) >= 10


@pytest.mark.parametrize(("line", "page"), commands())
def test_dry_run(line, page):
    variables, words = split(line)
    dry = [] if words == ["--help"] else ["--dry-run"]
    result = subprocess.run(
        [str(ROOT / "run.sh"), *dry, *words],
        cwd=ROOT,
        env=os.environ | {"VENV_DIR": "/nonexistent"} | variables,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert result.returncode == 0, (page, result.stderr)
    assert result.stdout.strip()


ALGOPERF = [item for item in commands() if " algoperf " in item[0] or " slurm " in item[0]]


@pytest.mark.parametrize(("line", "page"), ALGOPERF)
def test_flags_of_algoperf_are_accepted(line, page, tmp_path, monkeypatch):
    """As far as this machine can tell: with an empty folder in place of the data."""
    monkeypatch.chdir(ROOT)
    variables, words = split(line)
    for name in ("RANK", "WORLD_SIZE", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    if "NPROC" in variables:
        monkeypatch.setenv("NPROC", variables["NPROC"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    data = tmp_path / "data"
    (data / "imagenet_v2").mkdir(parents=True)
    cut = next(i for i, word in enumerate(words) if word in ("algoperf", "slurm"))
    words = [re.sub(r"(--data_dir=).*", rf"\1{data}", word) for word in words]
    options = words[cut + 1 :]
    if "--miniature" in options:
        manifest = {"workloads": [], "properties": {}}
        options.remove("--miniature")
        (data / "miniature.json").write_text(json.dumps(manifest))
    if words[cut] == "slurm":
        parsed, rest = slurm.parse_options(options)
        study = slurm.make_study(parsed, rest, {**os.environ, **variables})
        assert study.trials
    else:
        plan = launch.make_plan(*launch.parse_options(options))
        assert plan.world_size == int(variables.get("NPROC", 1))
