"""Every benchmark runs at its tiny size and writes its figures; how fast, nobody asserts."""

import json

import pytest
import torch
from rich.console import Console

from benchmarks import gpu_check
from benchmarks.__main__ import _parser, main

COMMANDS = {
    "step": ["--methods", "ours", "--fisher", "mc", "--models", "wrn", "gpt"],
    "sweep": ["--models", "vit", "--batch-sizes", "2", "4", "--approx", "reduce"],
    "amortised": ["--batch-sizes", "4"],
    "every-step": ["--models", "vit", "--batch-sizes", "4", "--eager", "--fisher", "mc"],
    "profile": ["--models", "wrn", "graph", "--approx", "expand", "--operators", "3"],
    "memory": ["--models", "vit", "--methods", "ours", "--approx", "expand"],
}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_it_runs_at_its_tiny_size(command, tmp_path, capsys):
    repeats = [] if command == "memory" else ["--repeats", "1"]
    options = ["--size", "tiny", "--threads", "1", "--output", str(tmp_path), *repeats]
    assert main([command, *COMMANDS[command], *options]) == 0
    saved = json.loads((tmp_path / f"{command}.json").read_text())
    assert saved["results"]
    assert saved["environment"]
    assert (tmp_path / f"{command}.png").stat().st_size > 1000
    assert "figures:" in capsys.readouterr().out


def test_the_gpu_check_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "check"
    good = gpu_check.Part("good", "a part", ("-c", "print('made of', 6 * 7)"))
    bad = gpu_check.Part("bad", "one that fails", ("-c", "raise SystemExit(3)"))
    slow = gpu_check.Part("slow", "one that takes too long", ("-c", "import time; time.sleep(60)"))
    lacking = gpu_check.Part("lacking", "one without its package", (), needs=("no_such_package",))
    monkeypatch.setattr(gpu_check, "PARTS", (good, bad, slow, lacking))

    def check(**options):
        return gpu_check.check(
            folder, torch.device("cpu"), Console(), quick=False, again=False, seconds=2,
            **{"names": ["good", "bad", "slow", "lacking"], **options},
        )  # fmt: skip

    assert check() == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "good: done" in told
    assert "bad: failed (exit 3)" in told
    assert "slow: stopped after 2 s" in told
    assert "lacking: not run: no_such_package is missing" in told
    assert "not done: bad, slow, lacking" in told
    assert check(names=["good"]) == 0
    assert "good: done" not in capsys.readouterr().out  # it is not done again
    page = (folder / "report.md").read_text()
    assert "made of 42" in page
    assert "| bad | one that fails | failed (exit 3) |" in page
    assert set(json.loads((folder / "report.json").read_text())["parts"]) == {
        "good", "bad", "slow", "lacking",
    }  # fmt: skip


def test_the_gpu_checks_parts_are_commands_that_exist(capsys):
    for part in gpu_check.PARTS:
        for command in (part.command, part.quick or ()):
            if command[:2] == ("-m", "benchmarks"):
                filled = [{"{device}": "cpu", "{folder}": "x"}.get(a, a) for a in command[2:]]
                assert _parser().parse_args(filled).command == filled[0]


def test_a_gpu_that_is_not_there_is_one_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["step", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
